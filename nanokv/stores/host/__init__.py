"""The place axis: name → its part with default options. One line per place."""

from nanokv.cache.protocol import Place
from nanokv.stores.host.kcache import KCache
from nanokv.stores.host.offload import Offload

PLACES: dict[str, Place] = {
    "device": Place(),
    "offload": Offload(),
    "kcache": KCache(),
}
