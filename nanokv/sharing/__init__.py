"""The share axis: name → what is asked of the search (`nanokv.share`). One line per method."""

from nanokv.sharing.kvsharer import KVSharer

SHARES: dict[str, KVSharer] = {"kvsharer": KVSharer()}
