"""The store axis: name → its spec with default options. One line per store."""

from nanokv.contract import StoreSpec
from nanokv.stores.dense import Dense
from nanokv.stores.ragged import Ragged

STORES: dict[str, StoreSpec] = {"dense": Dense(), "ragged": Ragged()}
