"""What runs on a GPU only: comparisons of every kernel with its plain implementation, and its speed beside others'."""
