"""The store axis: name → its spec with default options, and small settings for its tests. One line per store or short name
in each table.
"""

from nanokv.cache.protocol import StoreSpec
from nanokv.stores.dense import Dense
from nanokv.stores.host.kcache import KCache
from nanokv.stores.host.offload import Offload
from nanokv.stores.quant.coupled import Coupled
from nanokv.stores.quant.fp8 import Fp8
from nanokv.stores.quant.gear import Gear
from nanokv.stores.quant.int import Int
from nanokv.stores.quant.kvquant import KVQuant
from nanokv.stores.quant.minicache import MiniCache
from nanokv.stores.quant.mixed import Mixed
from nanokv.stores.quant.rot4 import Rot4
from nanokv.stores.quant.rot8 import Rot8
from nanokv.stores.quant.tuned import Tuned
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
    "tuned": Tuned(),
    "gear": Gear(),
    "fp8": Fp8(),
    "rot4": Rot4(),
    "rot8": Rot8(),
    "turbo": Turbo(),
    "kvquant": KVQuant(),
    "coupled": Coupled(),
    "minicache": MiniCache(),
    "mixed": Mixed(),
    "shadow": Shadow(),
    "quest": Quest(),
    "offload": Offload(),
    "kcache": KCache(),
}

# small enough that groups fill and rings wrap within 14 steps; the stores on the host are compared with `dense` bit by bit
EXAMPLES: dict[str, str] = {
    "dense": "dense",
    "ragged": "ragged",
    "int": "int:k=8,v=4,group=8,residual=4",
    "int8": "int8:group=4,residual=0",
    "int4": "int4:group=8,residual=8",
    "int2": "int2:group=4,residual=6,pin=3",
    "kivi4": "kivi4:group=4,residual=4,pin=2",
    "kivi2": "kivi2:group=2,residual=1",
    "tuned": "tuned:layers=k8v4-k2v4-k4v8,group=4,residual=2",
    "gear": "gear:group=8,residual=4,rank=1",
    "fp8": "fp8:pin=2",
    "rot4": "rot4:block=8",
    "rot8": "rot8:pin=2",
    "turbo": "turbo:k=4,v=3,pin=3",
    "kvquant": "kvquant:k=4,v=3,pin=2",
    "coupled": "coupled:channels=2",
    "minicache": "minicache:start=0.25,retain=0.1",
    "mixed": "mixed",
    "shadow": "shadow:chunk=4,local=1,outliers=2,rank=32,budget=48",  # reads all of 60 tokens
    "quest": "quest:chunk=4,budget=56",
}
