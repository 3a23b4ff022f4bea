"""What runs on a GPU only: comparisons of every kernel with its plain form, and its speed beside others'."""
