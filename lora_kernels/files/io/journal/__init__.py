"""Folders that are written with a journal, by one process or by several ranks."""

from .folder import JournaledFolder as JournaledFolder
from .lines import Record as Record
from .lines import identity as identity
from .ranks import ALONE as ALONE
from .ranks import Ranks as Ranks
