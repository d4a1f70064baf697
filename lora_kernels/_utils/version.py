"""The version of the package, and the versions of torch that a compiled extension fits."""

import re

__version__ = "0.2.0"


def torch_abi(version: str) -> str:
    """The part of torch's version that an extension depends on.

    Releases keep their C++ interface for a minor version: 2.13.1+cpu and 2.13.0+cu130 give "2.13".
    A build between releases, such as 2.14.0.dev20261128, is compatible only with itself.
    """
    release = re.fullmatch(r"(\d+\.\d+)\.\d+(\+.*)?", version)
    return release[1] if release else version
