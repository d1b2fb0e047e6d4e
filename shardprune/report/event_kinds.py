"""The events that a run records, and their fields.

A killed process leaves half a line, a full disk may tear one, and anybody may write into the file of an output that
came from elsewhere: whatever is read has the shape that is written down here.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from shardprune.printable import printable
from shardprune.storage.json_file import parse_json
from shardprune.storage.malformed import Malformed

LINE = 10_000_000  # characters of a line, at most: the spans of thousands of calls
LATEST = 253402300799.0  # seconds since the epoch at the end of the year 9999, the last one that a date can have

Moment = Annotated[float, Field(ge=0, le=LATEST, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**63)]


class _Event(BaseModel):
    """Base of all events: `time` is in seconds since the epoch. Further fields, as of other versions, are left out."""

    model_config = ConfigDict(extra="ignore", strict=True)

    time: Moment


class _InStep(_Event):
    """An event within a step: its position, if there is one. It is recorded at least every few seconds."""

    label: str | None = None
    detail: str | None = None
    done: Count | None = None
    total: Count | None = None

    @model_validator(mode="after")
    def _whole_position(self) -> "_InStep":
        named = self.model_fields_set & {"label", "done", "total"}
        if named and (self.label is None or self.done is None or self.total is None):
            raise ValueError("a position has a label, done and total")
        return self


class Run(_Event):
    """The command starts: `versions` are those of packages, `machine` is the kind of the driver's."""

    event: Literal["run"]
    command: str = ""
    fingerprint: str | None = None
    layers: Count | None = None
    versions: dict[str, str] = {}
    machine: str | None = None


class Attempt(_Event):
    """Workers are about to start; `finished` are the finished layers."""

    event: Literal["attempt"]
    finished: list[Count]
    shards: Count | None = None
    replicas: Count | None = None


class Begin(_Event):
    """A phase starts."""

    event: Literal["begin"]
    phase: str


class End(_Event):
    """A phase ends."""

    event: Literal["end"]
    phase: str
    seconds: Seconds | None = None


class Progress(_InStep):
    """The position of a step, or a sign of life where there is none."""

    event: Literal["progress"]


class Layer(_InStep):
    """A layer is finished: `seconds` it took, `bytes` its file has."""

    event: Literal["layer"]
    layer: Count
    shard: Count | None = None
    seconds: Seconds | None = None
    bytes: Count | None = None
    error: Number | None = None
    sparsity: Number | None = None


class Iteration(_InStep):
    """An iteration of `mop` is finished; `removed` is a share of the parameters, `share` one of the request."""

    event: Literal["iteration"]
    iteration: Count
    step: str
    removed: Number | None = None
    share: Number


# Verb, layer, start, end, busy, and what newer versions add: calls, bytes, kind (see `shard.ledger.Span`).
OldSpan = tuple[str, Count | None, Moment, Moment, Seconds]
PlainSpan = tuple[str, Count | None, Moment, Moment, Seconds, Count, Count]
Span = tuple[str, Count | None, Moment, Moment, Seconds, Count, Count, str]


class Work(_Event):
    """The spans of one worker since its last event."""

    event: Literal["work"]
    shard: Count
    replica: Count
    spans: list[Span | PlainSpan | OldSpan]


class Lost(_Event):
    """Workers were lost."""

    event: Literal["lost"]
    reason: str = ""


class Done(_Event):
    """The command ends."""

    event: Literal["done", "stopped"]


class Failed(_Event):
    """The command ends with an error."""

    event: Literal["failed"]
    error: str = ""


EVENT: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        Run | Attempt | Begin | End | Progress | Layer | Iteration | Work | Lost | Done | Failed,
        Field(discriminator="event"),
    ]
)


def event_of(line: str) -> dict[str, Any] | None:
    """Return the event of a line, with printable texts; None where the line holds none."""
    try:
        parse_json(line, LINE)
        event = EVENT.validate_json(line).model_dump(mode="json", exclude_unset=True)
    except (Malformed, ValidationError):
        return None
    return {name: printable(value) if isinstance(value, str) else value for name, value in event.items()}
