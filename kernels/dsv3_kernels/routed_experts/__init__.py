"""The routed experts of a mixture: rows sorted by expert, their feed-forward, the sum of a token's rows."""
