"""The store axis: name → its spec with default options. One line per store or short name."""

from nanokv.cache.protocol import StoreSpec
from nanokv.stores.dense import Dense
from nanokv.stores.host.kcache import KCache
from nanokv.stores.host.offload import Offload
from nanokv.stores.quant.fp8 import Fp8
from nanokv.stores.quant.int import Int
from nanokv.stores.quant.mixed import Mixed
from nanokv.stores.quant.rot4 import Rot4
from nanokv.stores.quant.turbo import Turbo
from nanokv.stores.ragged import Ragged
from nanokv.stores.sparse.quest import Quest
from nanokv.stores.sparse.shadow import Shadow

STORES: dict[str, StoreSpec] = {
    "dense": Dense(),
    "ragged": Ragged(),
    "int": Int(),
    "int8": Int(k=8, v=8),
    "int4": Int(),
    "int2": Int(k=2, v=2),
    "kivi4": Int(group=32, residual=32),
    "kivi2": Int(k=2, v=2, group=32, residual=32),
    "fp8": Fp8(),
    "rot4": Rot4(),
    "turbo": Turbo(),
    "mixed": Mixed(),
    "shadow": Shadow(),
    "quest": Quest(),
    "offload": Offload(),
    "kcache": KCache(),
}
