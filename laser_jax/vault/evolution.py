"""Which schema may follow which: fields are added with a default, numbers widened; everything else stays."""

import numpy as np

from laser_jax.schema import Field, Schema, SchemaError


def check_evolution(old: Schema, new: Schema) -> None:
    """Checks that events of `old` can be read as events of `new`.

    Raises:
      SchemaError: names the field or property that may not change like that.
    """
    for name in ("user", "time_unit", "event_key", "duplicates"):
        if getattr(old, name) != getattr(new, name):
            raise SchemaError(
                f"schema: {name} cannot change from {getattr(old, name)!r} to {getattr(new, name)!r}; ingest into a "
                "new vault"
            )
    for field in old.fields:
        if field.name not in new.names:
            raise SchemaError(f"field {field.name!r} is not in the new schema: fields stay; ignore it when reading")
        _check_field(field, new.field(field.name))
    for field in new.fields:
        if field.name not in old.names and field.default is None:
            raise SchemaError(f"field {field.name!r} is new: give it a default, for the events that lack it")


def _check_field(old: Field, new: Field) -> None:
    if old.size != new.size:
        raise SchemaError(f"field {old.name!r}: the size of its vectors cannot change from {old.size} to {new.size}")
    if old.default != new.default:
        raise SchemaError(f"field {old.name!r}: its default cannot change from {old.default!r} to {new.default!r}")
    if old.type == new.type:
        return
    kinds = old.dtype.kind + new.dtype.kind
    widened = False
    if "string" not in (old.type, new.type) and kinds in ("ii", "uu", "ui"):
        before, after = np.iinfo(old.dtype), np.iinfo(new.dtype)
        widened = after.min <= before.min and before.max <= after.max
    elif kinds == "ff":
        widened = new.dtype.itemsize > old.dtype.itemsize
    if not widened:
        raise SchemaError(
            f"field {old.name!r}: {old.type} cannot become {new.type}: only a type that holds every value; add a new "
            "field instead"
        )
