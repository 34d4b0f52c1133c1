"""What the journal's lines say: which jobs began and how they ended, where each drive was last.

Specification: docs/job-journal.md. Pure: lines in, records out, and back. A line is a JSON object;
the first one tells the version. Invariants: applying the lines that ``lines`` gives makes the same
history; a line that makes no sense changes nothing. ``ValueError`` for another version's journal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

HEADER: Final = {"journal": "liveblockd jobs", "version": 1}
#: ended jobs that are remembered; of all jobs twice as many
KEPT: Final = 200


@dataclass(frozen=True, slots=True)
class Image:
    """An image as it was: absolute name (or URL), format, and inode (0: it has none)."""

    file: str
    format: str
    inode: int = 0

    def to_json(self) -> dict[str, Any]:
        """For a line."""
        return {"file": self.file, "format": self.format, "inode": self.inode}

    @classmethod
    def from_json(cls, value: Any) -> Image:
        """From a line; KeyError, TypeError, ValueError."""
        return cls(str(value["file"]), str(value["format"]), int(value["inode"]))


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job; times are seconds since 1970, ``result`` is None until it has ended."""

    id: str
    type: str
    began: float
    #: from the highest to the lowest that it works on
    images: tuple[Image, ...] = ()
    #: what is below them, or the target; None: nothing is
    base: Image | None = None
    #: what it was asked for, without the names of nodes
    parameters: dict[str, Any] = field(default_factory=dict)
    ended: float | None = None
    result: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class DriveRecord:
    """A drive that was opened on ``opened`` and was last on ``active``."""

    opened: Image
    active: Image


class History:
    """``jobs`` by id, the oldest first; ``drives`` by id, those that are elsewhere than opened."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobRecord] = {}
        self.drives: dict[str, DriveRecord] = {}

    def under_way(self) -> list[JobRecord]:
        """Jobs whose end nobody has seen."""
        return [job for job in self.jobs.values() if job.result is None]

    def load(self, data: bytes) -> int:
        """Apply all lines of a journal; how many made no sense. The last may have been cut off."""
        bad = 0
        lines = data.split(b"\n")
        for number, line in enumerate(lines):
            try:
                value = json.loads(line) if line else None
            except ValueError:
                bad += number < len(lines) - 1
                continue
            if isinstance(value, dict) and "journal" in value:
                if value != HEADER:
                    raise ValueError(f"a journal of another version: {line[:80]!r}")
            elif value is not None:
                try:
                    self.apply(value)
                except (KeyError, TypeError, ValueError, AttributeError):
                    bad += 1
        return bad

    def apply(self, line: dict[str, Any]) -> None:
        """One line; KeyError, TypeError, ValueError if it makes no sense, and nothing changes."""
        if "began" in line:
            base = line["base"]
            record = JobRecord(
                str(line["began"]),
                str(line["type"]),
                float(line["time"]),
                tuple(Image.from_json(image) for image in line["images"]),
                None if base is None else Image.from_json(base),
                dict(line["parameters"]),
            )
            self.jobs.pop(record.id, None)  # the newest goes to the end
            self.jobs[record.id] = record
            if len(self.jobs) > 2 * KEPT:
                del self.jobs[next(iter(self.jobs))]
        elif "ended" in line:
            found = self.jobs[line["ended"]]
            error = line["error"]
            self.jobs[found.id] = replace(
                found,
                ended=float(line["time"]),
                result=str(line["result"]),
                error=None if error is None else str(error),
            )
            self._forget()
        elif "speed" in line:
            found = self.jobs[line["job"]]
            parameters = found.parameters | {"speed": int(line["speed"])}
            self.jobs[found.id] = replace(found, parameters=parameters)
        else:
            name = str(line["drive"])
            opened, active = Image.from_json(line["opened"]), Image.from_json(line["active"])
            if opened.file == active.file:
                self.drives.pop(name, None)
            else:
                self.drives[name] = DriveRecord(opened, active)

    def _forget(self) -> None:
        ended = [job.id for job in self.jobs.values() if job.result is not None]
        for job_id in ended[:-KEPT]:
            del self.jobs[job_id]

    def lines(self) -> Iterator[dict[str, Any]]:
        """The shortest journal that says the same."""
        yield HEADER
        for name, drive in self.drives.items():
            yield drive_line(name, drive.opened, drive.active)
        for job in self.jobs.values():
            yield began_line(job)
            if job.result is not None:
                yield ended_line(job.id, job.ended or 0.0, job.result, job.error)


def began_line(job: JobRecord) -> dict[str, Any]:
    """A job has begun."""
    return {
        "time": job.began,
        "began": job.id,
        "type": job.type,
        "images": [image.to_json() for image in job.images],
        "base": None if job.base is None else job.base.to_json(),
        "parameters": job.parameters,
    }


def ended_line(job_id: str, time: float, result: str, error: str | None) -> dict[str, Any]:
    """It has ended, or was given up."""
    return {"time": time, "ended": job_id, "result": result, "error": error}


def speed_line(job_id: str, speed: int) -> dict[str, Any]:
    """It has another speed now, in bytes per second; 0: no limit."""
    return {"job": job_id, "speed": speed}


def drive_line(name: str, opened: Image, active: Image) -> dict[str, Any]:
    """A drive that was opened on ``opened`` is on ``active`` now."""
    return {"drive": name, "opened": opened.to_json(), "active": active.to_json()}
