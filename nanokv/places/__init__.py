"""The place axis: name → its part with default options. One line per place."""

from nanokv.contract import Place
from nanokv.places.kcache import KCache
from nanokv.places.offload import Offload

PLACES: dict[str, Place] = {
    "device": Place(),
    "offload": Offload(),
    "kcache": KCache(),
}
