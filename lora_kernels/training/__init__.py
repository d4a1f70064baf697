"""Before, during and after a training run: gradients, optimizer groups, magnitudes, rescaling."""
