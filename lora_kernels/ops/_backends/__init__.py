"""Which kernels run where."""
