"""The keep axis: name → policy with the paper's defaults, and plans for its tests. One line per method or short name in
each table.
"""

from typing import NamedTuple

from nanokv.policies.base import Policy
from nanokv.policies.cascade import CascadingKV
from nanokv.policies.compactor import Compactor
from nanokv.policies.corm import CORM
from nanokv.policies.critical import CriticalKV
from nanokv.policies.dca import DualChunk
from nanokv.policies.defensive import DefensiveKV
from nanokv.policies.duo import DuoAttention
from nanokv.policies.expected import ExpectedAttention
from nanokv.policies.fastgen import FastGen
from nanokv.policies.full import Full
from nanokv.policies.h2o import H2O
from nanokv.policies.keydiff import KeyDiff
from nanokv.policies.keyformer import Keyformer
from nanokv.policies.knorm import Knorm
from nanokv.policies.kvzip import KVzip
from nanokv.policies.lagkv import LagKV
from nanokv.policies.mikv import MiKV
from nanokv.policies.pyramidinfer import PyramidInfer
from nanokv.policies.qaq import QAQ
from nanokv.policies.random import Random
from nanokv.policies.rkv import RKV
from nanokv.policies.scissorhands import Scissorhands
from nanokv.policies.simlayer import SimLayerKV
from nanokv.policies.snapkv import SnapKV
from nanokv.policies.streaming import StreamingLLM
from nanokv.policies.tova import TOVA
from nanokv.policies.triattention import TriAttention
from nanokv.policies.zipcache import ZipCache

POLICIES: dict[str, Policy] = {
    "full": Full(),
    "dca": DualChunk(),
    "random": Random(),
    "streaming": StreamingLLM(),
    "snapkv": SnapKV(),
    "pyramidkv": SnapKV(layers="pyramid"),
    "squeeze": SnapKV(layers="squeeze"),
    "adakv": SnapKV(heads="ada"),
    "chunkkv": SnapKV(select="chunk", kernel=1),
    "critical": CriticalKV(),
    "defensive": DefensiveKV(),
    "simlayer": SimLayerKV(),
    "pyramidinfer": PyramidInfer(),
    "h2o": H2O(),
    "tova": TOVA(),
    "keyformer": Keyformer(),
    "scissorhands": Scissorhands(),
    "corm": CORM(),
    "cascade": CascadingKV(),
    "duo": DuoAttention(),
    "fastgen": FastGen(),
    "knorm": Knorm(),
    "keydiff": KeyDiff(),
    "expected": ExpectedAttention(),
    "lagkv": LagKV(),
    "compactor": Compactor(),
    "kvzip": KVzip(),
    "rkv": RKV(),
    "triattention": TriAttention(),
    "mikv": MiKV(),
    "zipcache": ZipCache(),
    "qaq": QAQ(),
}


class Examples(NamedTuple):
    """Plans that every test of a policy uses. The first of `small` sets the budget and fields of the policy's own class, and
    nothing else of `Scorer`: tests append such options to it.
    """

    small: list[str]  # evict or demote something of 60 tokens
    whole: str  # keeps all of 80 tokens


EXAMPLES: dict[str, Examples] = {
    "full": Examples(["full"], "full"),
    "dca": Examples(["dca:context=32"], "dca:context=128"),
    "random": Examples(["random:budget=20,window=4"], "random:budget=80,window=4"),
    "streaming": Examples(["streaming:sink=2,recent=10", "streaming:budget=25%"], "streaming:sink=4,recent=200"),
    "snapkv": Examples(
        [
            "snapkv:budget=20,window=4,kernel=3",
            "snapkv:budget=30%,window=4,kernel=5,pool=avg,group=max",
            "snapkv:budget=20,window=4,kernel=3,every=5",
            "snapkv:budget=20,window=4,kernel=3,layers=pyramid,heads=ada,every=6",
        ],
        "snapkv:budget=80,window=4",
    ),
    "pyramidkv": Examples(["pyramidkv:budget=20,window=4,kernel=3"], "pyramidkv:budget=80,window=4"),
    "squeeze": Examples(["squeeze:budget=20,window=4,kernel=3"], "squeeze:budget=80,window=4,squeeze=1"),
    "adakv": Examples(
        ["adakv:budget=20,window=4,kernel=3", "adakv:budget=20,window=4,kernel=3+dense"], "adakv:budget=80,window=4"
    ),
    "chunkkv": Examples(["chunkkv:budget=20,window=4,kernel=3,chunk=6"], "chunkkv:budget=80,window=4"),
    "critical": Examples(
        ["critical:budget=20,window=4,kernel=3", "critical:budget=30%,window=4,kernel=1,heads=ada,every=6"],
        "critical:budget=80,window=4",
    ),
    "defensive": Examples(
        ["defensive:budget=20,window=4,kernel=3", "defensive:budget=30%,window=4,layers=compete"],
        "defensive:budget=80,window=4",
    ),
    "simlayer": Examples(
        [
            "simlayer:threshold=0.45,sink=2,recent=16,window=4",
            "simlayer:threshold=0,sink=2,recent=16,window=4,roll=false",
            "simlayer:variant=light,sink=2,recent=16,window=4,full=1",
            "simlayer:variant=decode,threshold=0,sink=2,recent=16",
        ],
        "simlayer:threshold=0,recent=200",
    ),
    "pyramidinfer": Examples(
        ["pyramidinfer:ratio=0.4,recent=6,sink=2,context=4", "pyramidinfer:budget=95%,recent=10%,sink=1,context=0"],
        "pyramidinfer:ratio=1",
    ),
    "h2o": Examples(["h2o:budget=20,recent=0.3", "h2o:budget=30%,layers=pyramid,heads=ada"], "h2o:budget=80"),
    "tova": Examples(["tova:budget=20"], "tova:budget=80"),
    "keyformer": Examples(["keyformer:budget=20,seed=3,tau=1.5"], "keyformer:budget=80"),
    "scissorhands": Examples(["scissorhands:budget=24,every=5,window=16,recent=3"], "scissorhands:budget=200"),
    "corm": Examples(["corm:window=6,recent=8,every=4", "corm:window=6,recent=8,every=4+dense"], "corm:recent=200"),
    "cascade": Examples(["cascade:budget=20,sink=2,rings=3"], "cascade:budget=84"),
    "duo": Examples(
        ["duo:full=0.5,sink=2,recent=10,window=4", "duo:full=0.5,sink=2,recent=10,window=4+dense"], "duo:recent=200"
    ),
    "fastgen": Examples(
        ["fastgen:recovery=0.75,frequent=10%,local=20%,sink=2", "fastgen:recovery=0.8,frequent=9,local=15+dense"],
        "fastgen:recovery=1",
    ),
    "knorm": Examples(["knorm:budget=20", "knorm:budget=20,heads=ada"], "knorm:budget=80"),
    "keydiff": Examples(
        ["keydiff:budget=20", "keydiff:budget=20,every=4,layers=pyramid,heads=ada"], "keydiff:budget=80"
    ),
    "expected": Examples(
        ["expected:budget=20,sink=2,future=32", "expected:budget=40%,sink=1,heads=ada,select=chunk,chunk=4"],
        "expected:budget=80",
    ),
    "lagkv": Examples(
        ["lagkv:budget=20,sink=2,lag=8", "lagkv:budget=40%,sink=3,lag=5,heads=ada,every=6"], "lagkv:budget=80"
    ),
    "compactor": Examples(
        ["compactor:budget=20,sink=2,recent=3,block=16", "compactor:budget=40%,sink=0,block=7,blend=0.5,heads=ada"],
        "compactor:budget=80",
    ),
    "kvzip": Examples(
        ["kvzip:budget=20,sink=2,piece=25", "kvzip:budget=40%,sink=0,layers=flat,heads=flat"],
        "kvzip:budget=80",
    ),
    "rkv": Examples(
        [
            "rkv:budget=20,every=0,window=4,kernel=3,mix=0.5,similar=0.2",
            "rkv:budget=40%,every=6,window=3,kernel=1,heads=ada",
        ],
        "rkv:budget=80,every=8",
    ),
    "triattention": Examples(
        ["triattention:budget=20,every=0,recent=4,far=100", "triattention:budget=140,every=128,recent=3,heads=ada"],
        "triattention:budget=300",
    ),
    "mikv": Examples(["mikv:budget=20,recent=0.3"], "mikv:budget=80"),
    "zipcache": Examples(["zipcache:every=5"], "zipcache:salient=1+mixed:high=16"),
    "qaq": Examples(["qaq:epsilon=0.1,window=4,every=5"], "qaq:epsilon=1e-9+mixed:high=16"),
}
