"""The whole configuration of a run: the parts' configs, each defined beside the part, put together."""

import dataclasses
import json
import os
from typing import Any

from flax import nnx

from laser_jax.features import FeatureConfig, FieldConfig, source_of
from laser_jax.models import ENCODERS
from laser_jax.models.base import EncoderConfig, HeadConfig, Ranker, TokenLayout
from laser_jax.optim import OptimConfig
from laser_jax.pipeline import DataConfig
from laser_jax.sharding import MeshConfig
from laser_jax.whole_files import replacing


@dataclasses.dataclass
class TrainConfig:
    """The loop.

    Attributes:
      seed: of the initial parameters.
      eval_every, save_every: in steps; an evaluation also saves.
      log_every: steps a line.
      length_edges: lower bounds of the history lengths that figures are also reported by.
      gate_maps: users drawn in the report.
      warm_start: workdir of another run to begin with; empty for none. warm_parts: what of it, "dense", "tables" or
        both.
      patience_s: seconds without a step or an evaluated batch after which one of several processes takes the others for
        gone and ends; more than a step and its compilation take.
    """

    seed: int = 0
    eval_every: int = 200
    save_every: int = 200
    log_every: int = 20
    length_edges: tuple[int, ...] = (0, 50, 200, 500, 1000)
    gate_maps: int = 3
    warm_start: str = ""
    warm_parts: tuple[str, ...] = ("dense", "tables")
    patience_s: float = 900.0


@dataclasses.dataclass
class Config:
    """A run. `encoder` is one of laser_jax.models; `width` is d."""

    data: DataConfig
    features: FeatureConfig
    encoder: EncoderConfig
    name: str = ""
    width: int = 64
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def build_model(self, rngs: nnx.Rngs) -> Ranker:
        """The ranker this config describes.

        Raises:
          ValueError: it describes none.
        """
        comparable = {field.name for field in self.features.item if not field.bagged and field.ids != "vector"}
        compared = [(name, f"head.matches={self.head.matches}") for name in self.head.matches]
        if hasattr(self.encoder, "field"):  # of sim_hard
            compared.append((self.encoder.field, "encoder.field"))
        for name, setting in compared:
            if name not in comparable:
                raise ValueError(
                    f"{setting}: {name!r} is no field of the items that has one value, which are "
                    f"{', '.join(sorted(comparable)) or 'none'}"
                )

        def entries(fields):
            return tuple((field.name, source_of(field), field.width) for field in fields)

        features = self.features
        layout = TokenLayout(
            history=entries((*features.item, *features.event)),
            candidate=entries(features.item),
            context=entries(features.context),
        )
        return Ranker(
            layout,
            self.encoder,
            self.head,
            width=self.width,
            history_length=self.data.history_length,
            age_width=features.age_width,
            age_buckets=features.age_buckets,
            embedding_std=self.optim.table_std,
            rngs=rngs,
        )


def to_dict(config: Any) -> Any:
    """Nested dataclasses as plain values, each with its class, so that two kinds of encoder differ."""
    if dataclasses.is_dataclass(config):
        return {"class": type(config).__name__} | {
            field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)
        }
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return config


def set_values(config: Any) -> Any:
    """A config as plain values, of each dataclass only those that are not its class's defaults."""
    if dataclasses.is_dataclass(config):
        values = {"class": type(config).__name__}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            given = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if given is dataclasses.MISSING or value != given:
                values[field.name] = set_values(value)
        return values
    if isinstance(config, (tuple, list)):
        return [set_values(value) for value in config]
    return config


# What may change between a run and its continuation: none of it changes what is learned.
FREE_TO_CHANGE = (
    "train.log_every",
    "train.gate_maps",
    "train.length_edges",
    "train.patience_s",
    "mesh.data",
    "mesh.model",
    "mesh.split_from",
    "optim.microbatches",
    "optim.length_steps",
    "data.path",
    "data.vault",
    "data.threads",
    "data.prefetch",
    "data.cache_bytes",
)
BESIDE = ("fingerprint", "strings")  # what stands in config.json beside the config: what tells the data
_VAULT = "fingerprint.vault"  # begins the names of what tells one vault from another
_COLUMNS = "/columns"  # ends those of what tells the values of requests; runs and data of earlier code have none
AT_LEAST_ONE = {
    "data": (
        "history_length",
        "batch_size",
        "candidates",
        "eval_batch_size",
        "eval_candidates",
        "epochs",
        "shuffle_block",
        "threads",
        "prefetch",
    ),
    "train": ("eval_every", "save_every", "log_every"),
    "head": ("tokens", "width", "expansion", "match_gates"),
    "features": ("age_width", "age_buckets"),
}
AT_LEAST_NONE = {
    "data": ("seed", "cache_bytes"),
    "train": ("seed", "gate_maps"),
    "head": ("blocks",),
}


def kinds() -> dict[str, type]:
    """The classes of a config's parts by their names."""
    parts = (Config, DataConfig, FeatureConfig, FieldConfig, HeadConfig, OptimConfig, MeshConfig, TrainConfig)
    return {kind.__name__: kind for kind in (*parts, *(type(make()) for make in ENCODERS.values()))}


def from_dict(value: Any) -> Any:
    """The inverse of to_dict, but for the data's recipe, which is left out. A field that is absent has its default.

    Raises:
      ValueError: a class or a field that this version does not have.
    """
    if isinstance(value, list):
        return tuple(from_dict(one) for one in value)
    if not isinstance(value, dict) or "class" not in value:
        return value
    known = kinds()
    if value["class"] not in known:
        raise ValueError(f"this version has no config called {value['class']!r}")
    kind = known[value["class"]]
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = set(value) - names - {"class"}
    if unknown:
        raise ValueError(f"{value['class']} has no field {min(unknown)!r} in this version")
    return kind(**{name: from_dict(one) for name, one in value.items() if name in names and name != "recipe"})


def check_sizes(config: Config) -> None:
    """Raises ValueError, naming the field, for sizes that no run can have, and for some that would do nothing."""
    for part, names in AT_LEAST_ONE.items():
        for name in names:
            value = getattr(getattr(config, part), name)
            if value < 1:
                raise ValueError(f"{part}.{name}={value}: give at least 1")
    if config.width < 1:
        raise ValueError(f"width={config.width}: give at least 1")
    for part, names in AT_LEAST_NONE.items():
        for name in names:
            value = getattr(getattr(config, part), name)
            if value < 0:
                raise ValueError(f"{part}.{name}={value}: give 0 or more")
    config.optim.check()
    if config.head.match_horizons and not config.head.matches:
        raise ValueError(
            f"head.match_horizons={config.head.match_horizons} are of head.matches, of which there are none: give () "
            "for both"
        )
    if not config.train.patience_s > 0:
        raise ValueError(f"train.patience_s={config.train.patience_s}: give more than 0")
    edges = config.train.length_edges
    if edges[:1] != (0,) or list(edges) != sorted(set(edges)):
        raise ValueError(f"train.length_edges={edges}: give ascending lower bounds that begin with 0")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict's values by their dotted names."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flatten(part, f"{prefix}{key}.").items()}
    return {prefix[:-1]: value}


def remember(
    config: Config, workdir: str, data: dict[str, str], strings: dict[str, list[Any]], write: bool = True
) -> None:
    """Writes workdir/config.json, or checks it where a run is being continued.

    A field that an older version did not have is no difference where it has its default: that is what the version did.

    Args:
      data, strings: of the data set (laser_jax.fingerprint), kept beside the config. Strings may be added meanwhile.
      write: whether this process writes it if it is not there.

    Raises:
      ValueError: the run in `workdir` has another config or other data; names every field that differs.
    """
    path = os.path.join(workdir, "config.json")
    beside = dict(zip(BESIDE, (data, strings), strict=True))
    now = json.loads(json.dumps(to_dict(config) | beside))
    if not os.path.exists(path):
        if not write:
            return
        os.makedirs(workdir, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(now, indent=1).encode())
        return
    with open(path, encoding="utf-8") as file:
        before = flatten(json.load(file))
    after = flatten(now)
    given = flatten(set_values(config))
    changed = [
        f"{key}: {before.get(key, 'absent')!r} -> {after.get(key, 'absent')!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and key not in FREE_TO_CHANGE
        and not key.startswith("strings.")
        and not (key in after and key not in before and not key.startswith("fingerprint.") and key not in given)
        and not (key.endswith(_COLUMNS) and not (key in before and key in after))
    ]
    if changed and all(entry.startswith(_VAULT) for entry in changed):
        raise ValueError(
            f"{workdir} holds a run on a vault that has changed since, by appends, by merging or for another one "
            f"({'; '.join(changed)}): give another --workdir. Pinned by data.snapshot, a vault stays as it is for "
            "a run, whatever is appended meanwhile"
        )
    if changed:
        raise ValueError(
            f"{workdir} holds a run of another config ({'; '.join(changed)}): give another --workdir, or the old values"
        )
