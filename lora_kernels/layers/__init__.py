"""One layer with adapters."""
