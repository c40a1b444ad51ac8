"""The share axis: name → the options of its search. One line per method. No policy and no store may enter this
folder.
"""

from nanokv.sharing.base import Sharing
from nanokv.sharing.kvsharer import KVSharer

SHARES: dict[str, Sharing] = {"kvsharer": KVSharer()}
