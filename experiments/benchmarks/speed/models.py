"""The models whose speed is measured: released shapes, whole or cut to what one device holds, and their schedules."""

from __future__ import annotations

import dataclasses

from experiments.common import inputs
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule

CUT_LAYERS = 4  # of a model that does not fit one device

# The searched patterns that the paper publishes (arXiv 2603.12201); other models keep indexers at even distances.
SEARCHED = {
    ("30b", "1/2"): "FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF",
    ("30b", "1/4"): "FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS",
    ("30b", "1/8"): "FSSSFSSSSSSSSFSSSFSSSSSFSSSSFSSSSSSSSFSSSSSSSSS",
    ("glm-5", "1/2"): "FFSFSSSFSSFFFSSSFFFSFSSSSSSFFSFFSFFSSFFFFFFSFFFFFSFFSSSSSSFSFFFSFSSSFSFFSFFSSS",
    ("glm-5", "1/4"): "FFSFSSSFSSFSFSSSSSSSFSSSSSSFSSSFSFSSSSFFFFFSSSFFSSSFSSSSSSSSFSSSFSSSSSSFSFSSSS",
}


@dataclasses.dataclass(frozen=True)
class Model:
    """The shape that is measured, and by what its times are multiplied to be those of the whole model."""

    name: str
    config: Config
    layers: int  # of the whole model

    @property
    def scale(self) -> float:
        return self.layers / self.config.num_layers

    def schedule(self, entry: str) -> Schedule:
        """The schedule that an entry of --schedule gives: at a share, the pattern that the paper searched for this model."""
        if self.scale == 1 and (self.name, entry) in SEARCHED:
            return Schedule(SEARCHED[self.name, entry])
        return inputs.schedule(entry, self.config.num_layers)


def model(name: str, num_layers: int) -> Model:
    """The preset, cut to `num_layers` expert layers where that is not 0, and the two largest always."""
    whole, _ = inputs.preset_model(name)
    if num_layers == 0 and name not in ("30b", "demo"):
        num_layers = CUT_LAYERS
    if num_layers == 0 or num_layers == whole.num_layers:
        return Model(name, whole, whole.num_layers)
    if not 0 < num_layers < whole.num_layers:
        raise ValueError(f"--num_layers={num_layers}: {name} has {whole.num_layers} layers")
    return Model(name, inputs.cut(whole, (True,) * num_layers), whole.num_layers)
