"""What is measured on a GPU: sizes, aims and predicted times."""
