"""What the code of a page needs and must do: a module for each page of README and docs.

`names(folder)` gives the names that a reader has (`model`, `batches`), and puts files into the
folder in which the code runs. `check(names, output, folder)`, which may be left out, asserts what
the code has done.
"""
