"""What a run leaves on disk: the kept lines of its stages, its records, its folder.

    runs/stages/H-<bench>-<model>-<digest>.<process>.jsonl      kept lines, one a sample
    runs/<name>/config.json, records.jsonl, summary.json        a run: the join of its lines
    runs/<name>/adapters/<id>/                                  --keep-adapters: in peft's format

A stage is a function from samples to lines of JSON. Its lines lie in files that are named by a
digest of all that a line depends on besides its sample: the stage's code, the options and facts
that it reads, and the same of each stage whose lines it sees.
"""
import ast
import fcntl
import hashlib
import inspect
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from glob import escape
from pathlib import Path
from typing import IO

import torch

THIS = Path(__file__).resolve()
# why a line tells of a failure; only for want of memory a later start tries again
OUT_OF_MEMORY, TOO_LONG, NON_FINITE = "out of memory", "too long", "non-finite"


# --- Stages: what is known of a function whose lines are kept -------------------------------------
@dataclass(frozen=True)
class Stage:
    name: str
    line: type                  # the dataclass of a line; it has the fields id, failed and seconds
    reads: tuple[str, ...]      # the options and facts that a line depends on
    code: str                   # a digest of the function and of what it names
    adapters: bool              # with --keep-adapters it leaves an adapter beside each line


def stage(name: str, line: type, *reads: str, adapters: bool = False) -> Callable:
    """Mark a function (agent, samples, config, *lines seen) -> lines as a stage, for `Kept`."""
    def mark(function: Callable) -> Callable:
        function.stage = Stage(name, line, reads, code_digest(function), adapters)
        return function
    return mark


def code_digest(*functions: Callable) -> str:
    """A digest of what functions do: of their code, and of all in this project that it names, in
    turn. It is made of what was loaded, without comments, docstrings and line numbers.

    The type of a parameter `config` is not followed, since the options that are read stand in a
    key on their own; nor is this file, which keeps lines and makes none. ValueError for a lambda
    or a nested function, whose code could not be told from another's."""
    todo, found = [(Path(inspect.getfile(f)).resolve(), f.__name__) for f in functions], {}
    for file, name in todo:
        if not file.is_file():
            raise ValueError(f"{name} has no file, so no key can tell its code from another's: put "
                             "it into a .py file, and import it from there")
        if name not in definitions(file):
            raise ValueError(f"{name} in {file}: a stage or a task takes functions that a file "
                             "defines at its top level")
    while todo:
        file, name = todo.pop()
        if (file, name) in found or file == THIS or name not in definitions(file):
            continue                                # a local name, a builtin, another library's
        found[file, name], named = definitions(file)[name]
        todo += named
    return hashlib.sha256("\n".join(sorted(found.values())).encode()).hexdigest()[:16]


@cache
def definitions(file: Path) -> dict[str, tuple[str, list[tuple[Path, str]]]]:
    """Each name that a file defines: its code, without docstrings, and the names in that code, as
    (file, name). A file is read once. For `def f(x): return g(x)` in a.py it is
    {"f": (code, [(a.py, "g"), (a.py, "x")])}; for `from b import g` {"g": ("", [(b.py, "g")])}."""
    tree, found = ast.parse(file.read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        is_block = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if is_block and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
        if isinstance(node, ast.arg) and node.arg == "config":
            node.annotation = None
    for node in tree.body:
        parts = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
        text, named = ast.dump(node), [(file, part.id) for part in parts]
        defined = [part.id for part in parts if isinstance(part.ctx, ast.Store)]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined = [node.name]
        for name in defined:
            found[name] = text, named
        for alias in getattr(node, "names", []):                    # of an import
            origin = getattr(node, "module", None)
            part = sys.modules.get(f"{origin}.{alias.name}")        # `from package import module`
            module = part or sys.modules.get(origin or alias.name)
            path = Path(getattr(module, "__file__", None) or "/").resolve()
            if path.is_relative_to(THIS.parent.parent) and "site-packages" not in path.parts:
                whole = bool(part) or isinstance(node, ast.Import)
                named = [(path, each) for each in (definitions(path) if whole else [alias.name])]
                found[alias.asname or alias.name] = "", named
    return found


# --- Kept lines -----------------------------------------------------------------------------------
class Lines(dict):
    """Lines of a stage by sample id, with the key of what they depend on."""
    key: dict = {}


class Missing(Exception):
    """A line is not there, and none is to be computed."""


@dataclass
class Kept:
    """kept(stage, samples, *seen): the lines of a stage by sample id. Those on disk are read, the
    others are computed by stage(agent, samples, config, *seen) and appended. Each process appends
    to files of its own, so any number of them may work, and be killed."""
    agent: object
    config: object
    computing: bool = True          # else Missing is raised where a line is not there
    failures: bool = False          # read also the lines that tell of too little memory
    keys: dict[str, dict] = field(default_factory=dict)     # a file's name -> its key
    lines: dict[str, dict] = field(default_factory=dict)    # a file's name -> sample -> line
    files: dict[str, Path] = field(default_factory=dict)    # a file's name -> this process's file
    sizes: dict[str, int] = field(default_factory=dict)     # stage -> samples that memory has held
    lock: IO | None = None          # while it is open, a run works here

    def __call__(self, function: Callable, samples: Sequence, *seen: Lines) -> Lines:
        stage, known = function.stage, {**vars(self.config), **self.agent.facts}
        key = {"stage": stage.name, "code": stage.code,
               **{name: known[name] for name in stage.reads}, "seen": [each.key for each in seen]}
        stem = f"{stage.name}-{known['bench']}-{Path(known['model']).resolve().name[:40]}"
        name = f"{stem}-{digest(key)[:12]}"
        if name not in self.lines:
            self.keys[name], self.lines[name] = key, self.read(stage, name)
        lines, of = self.lines[name], {x.id: digest(x) for x in samples}
        marks, missing = {}, []         # marks: a sample -> the file that names its adapter's line
        if stage.adapters and self.config.keep_adapters:
            marks = {x.id: adapter_folder(self.config.out, x.id) / "line" for x in samples}
        for x in samples:
            line, mark = lines.get(of[x.id]), marks.get(x.id)
            is_there = not mark or mark.is_file() and mark.read_text() == f"{name} {of[x.id]}"
            if not line or not (line.failed or is_there):
                missing.append(x)
        if missing and not self.computing:
            raise Missing(missing[0].id)
        while missing:
            new, fresh = {of[line.id]: line for line in self.compute(function, missing, seen)}, {}
            for each, line in new.items():
                if each not in lines:
                    fresh[each] = line
                if line.id in marks and not line.failed:
                    marks[line.id].write_text(f"{name} {each}")
            if fresh:
                self.append(name, [{"of": each, **asdict(line)} for each, line in fresh.items()])
            lines |= fresh
            missing = [x for x in missing if of[x.id] not in new]
        found = Lines({x.id: lines[of[x.id]] for x in samples})
        found.key = key
        return found

    def read(self, stage: Stage, name: str) -> dict:
        """The lines that any process has kept, by the digest of their sample; a torn one is skipped
        with a notice."""
        lines, make = {}, getattr(stage.line, "from_json", stage.line)
        folder = Path(self.config.out).parent / "stages"
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = self.lock or open(folder / ".lock", "a")
        fcntl.flock(self.lock, fcntl.LOCK_SH)           # until this object ends: nothing is pruned
        for path in sorted(folder.glob(f"{escape(name)}.*.jsonl")):
            for number, text in enumerate(path.read_bytes().split(b"\n")[1:], 2):
                if not text:
                    continue
                try:
                    fields = json.loads(text)
                    of, line = fields.pop("of"), make(**fields)
                    again = line.failed == OUT_OF_MEMORY and (of in lines or not self.failures)
                except (ValueError, TypeError, LookupError, AttributeError):
                    print(f"{path}, line {number}: is torn; its sample is computed again")
                    continue
                if not again:
                    lines[of] = line
        return lines

    def compute(self, function: Callable, samples: Sequence, seen: Sequence[Lines]) -> list:
        """The lines of as many of the first samples as the stage takes and the memory holds: where
        it does not, of half as many. A sample that it does not hold alone, or that the model's
        context does not, has a line that says so."""
        stage, start, new, failed = function.stage, time.perf_counter(), [], ""
        part = samples[:self.sizes.get(stage.name)]
        while not new:
            try:
                new = function(self.agent, part, self.config, *seen)
            except OverflowError:
                failed = TOO_LONG
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                failed = OUT_OF_MEMORY
            # out here the error is gone, and with it what the failed pass has left in memory
            assert new or failed, f"stage {stage.name} gave no line"
            if not new and len(part) == 1:
                new = [stage.line(part[0].id, failed=failed)]
            elif not new:
                part = part[:len(part) // 2]
                if failed == OUT_OF_MEMORY:
                    self.sizes[stage.name] = len(part)
        for line in new:
            line.seconds = round((time.perf_counter() - start) / len(new), 4)
        return new

    def append(self, name: str, lines: Sequence[dict]) -> None:
        """Add lines to this process's file, in one write, flushed and synced."""
        if name not in self.files:
            folder = Path(self.config.out).parent / "stages"
            self.files[name] = folder / f"{name}.{uuid.uuid4().hex[:8]}.jsonl"
        with open(self.files[name], "a", encoding="utf-8") as file:
            if not file.tell():
                lines = [{"key": self.keys[name]}, *lines]
            file.write("".join([json.dumps(line, allow_nan=False) + "\n" for line in lines]))
            file.flush()
            os.fsync(file.fileno())


def out_of_memory(error: RuntimeError) -> bool:
    """Also where cuBLAS cannot get its workspace, or the CPU no memory, which torch reports in
    other ways."""
    said = ("CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in said)


def digest(value: object) -> str:
    """A digest of a JSON value, in which dataclasses may stand."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=asdict).encode()).hexdigest()


def key_in(path: Path) -> dict:
    """The key that a file of kept lines begins with; {} if that line is torn."""
    try:
        with open(path, "rb") as file:
            return json.loads(file.readline())["key"]
    except (ValueError, TypeError, LookupError):
        return {}


def agrees(key: dict, known: dict, code: dict | None = None) -> bool:
    """Is it the key of a stage with these options and facts (and this code, {stage: digest})?"""
    own = [key[name] == known[name] for name in key.keys() & known.keys() - {"code", "seen"}]
    of_code = code is None or "stage" not in key or key["code"] == code.get(key["stage"])
    return of_code and all(own) and all([agrees(seen, known, code) for seen in key.get("seen", ())])


def forget(config: object, facts: dict) -> None:
    """Delete the kept lines of this configuration (--fresh): those of its benchmark and model whose
    key has its options and facts, whatever the code."""
    known = json.loads(json.dumps({**vars(config), **facts}))       # as a file has it
    stem = f"-{config.bench}-{Path(config.model).resolve().name[:40]}"
    for path in Path(config.out).parent.glob(f"stages/*{escape(stem)}-*.jsonl"):
        key = key_in(path)
        if key and path.name.rpartition("-")[0] == key["stage"] + stem and agrees(key, known):
            path.unlink()


@dataclass
class KeptFile:
    """A file of kept lines, and the run folders whose configuration reads it."""
    path: Path
    key: dict                   # {}: it is torn
    size: int                   # bytes
    readers: list[Path]


def stages_in(folder: Path) -> Path:
    """Where a folder of runs, such as runs/, keeps lines. FileNotFoundError if it is none."""
    if not (folder / "stages").is_dir():
        raise FileNotFoundError(f"no folder {folder}/stages: give a folder of runs, such as runs")
    return folder / "stages"


def kept_files(folder: Path) -> list[KeptFile]:
    """What is kept in a folder of runs; ValueError for a run folder in it that does not tell what
    it reads."""
    runs, found = [], []
    for path in sorted(folder.glob("*/config.json")):
        try:
            config = json.loads(path.read_bytes())
            runs.append((path.parent, {**config, **config["facts"]}, dict(config["code"])))
        except (ValueError, TypeError, LookupError):
            raise ValueError(f"{path} does not tell what its run reads: is it damaged, or of an "
                             "older version? Mend it, or delete that folder") from None
    for path in sorted(stages_in(folder).glob("*.jsonl")):
        found.append(KeptFile(path, key_in(path), path.stat().st_size, []))
        key = found[-1].key
        for run, known, code in runs if key else ():
            is_named = path.name.startswith(f"{key['stage']}-{known['bench']}-")
            if is_named and agrees(key, known, code):
                found[-1].readers.append(run)
    return found


def prune(folder: Path) -> list[KeptFile]:
    """Delete the kept lines that no run folder's key names, and tell which they were; not those
    with a torn key. ValueError while a run works in this folder."""
    with open(stages_in(folder) / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"a run works in {folder}: prune when it has ended") from None
        unread = [each for each in kept_files(folder) if each.key and not each.readers]
        for each in unread:
            each.path.unlink()
    return unread


def other_keys(kept: Kept) -> list[str]:
    """How the kept lines that are there for this benchmark and model differ from those that are
    looked for: a sentence for each stage and difference."""
    said, folder = {}, Path(kept.config.out).parent
    for name, key in json.loads(json.dumps(kept.keys)).items():         # as a file has it
        stem = name.rpartition("-")[0]
        for path in folder.glob(f"stages/{escape(stem)}-*.jsonl"):
            other = key_in(path)
            differing = [part for part in key if key[part] != other.get(part)]
            if differing and path.name.rpartition("-")[0] == stem:
                what = ", ".join(differing)
                said[f"Lines of {key['stage']} are there that differ in: {what}."] = None
    return list(said)


# --- Records: what a run found out of each sample -------------------------------------------------
@dataclass(frozen=True)
class Verdict:
    """What an answer is worth. `exact` is the score; the rest says why, and how far off it is."""
    text: str                       # the answer
    exact: bool | None              # it means what the gold answer means; None: there is none
    reason: str                     # "" if exact, else what is wrong first; its kind before ":"
    measures: dict[str, float]      # what else the task measures of an answer


@dataclass(frozen=True)
class Record:
    """One sample of a run: what H, G and T saw, and the verdicts before and after."""
    id: str
    request: str
    margin: float | None            # u(x) = p(1) - p(2), in [0, 1]; None: H has failed
    uncertain: bool                 # what the gate decided
    outcome: str                    # certain; direct: uncertain, and nothing was tried; adapted;
                                    # no pair; or how a stage has failed
    candidates: dict[str, float]    # action: l_n in nats
    base: Verdict                   # of the direct answer
    answer: Verdict                 # of the answer that counts
    pairs: list[dict]               # of G, as in augment.Pair ...
    rejected: list[dict]            # ... and augment.Rejected
    losses: list[float]             # one a training step, in nats
    norms: list[float]              # of the gradient, likewise
    seconds: dict[str, float]       # by stage
    gold: str                       # the gold answer as text
    log_p: list[float]              # of the direct answer's tokens, its end included, in nats
    entropy: list[float]            # likewise
    ids: list[int]                  # the direct answer's tokens without its end
    prompt_tokens: int
    extra: dict = field(default_factory=dict)       # what a run of research adds


@dataclass(frozen=True)
class Run:
    folder: Path
    config: dict
    records: list[Record]


# options that change no outcome, or whose effect the facts tell; facts that tell of the machine
FREE = {"ask", "batch", "checkpointing", "out", "device", "dtype", "pack", "offline",
        "keep_adapters", "fresh", "torch", "python"}


def run_folder(config: object, facts: dict) -> str:
    """The run folder --out, in which a "*" at the end stands for a short digest of what the run
    depends on. ValueError if it holds a run of another configuration."""
    mine = {**vars(config), **facts}
    for name in FREE:
        mine.pop(name, None)
    mine, was = json.loads(json.dumps(mine)), []
    folder = config.out.removesuffix("*") + digest(mine)[:6] * config.out.endswith("*")
    path = Path(folder) / "config.json"
    if not path.is_file():
        return folder
    try:
        there = dict(json.loads(path.read_bytes()))
        there |= there["facts"]
    except (ValueError, TypeError, LookupError):
        raise ValueError(f"{path} is damaged; delete it, or choose another --out") from None
    for name in mine:
        if mine[name] != there.get(name):
            was.append(f"{name} {there.get(name)!r:.30}, now {mine[name]!r:.30}")
    if was:
        raise ValueError(f"{folder} holds a run of another configuration ({'; '.join(was)}): "
                         "choose another --out, or delete it")
    return folder


def write_run(run: Run, summary: dict) -> bool:
    """Write config.json, records.jsonl and summary.json, each whole or not at all; never a NaN.
    A folder of more records is left as it is: False."""
    contents = {"config.json": json.dumps(run.config, indent=2, allow_nan=False) + "\n",
                "records.jsonl": "".join([json.dumps(asdict(record), allow_nan=False) + "\n"
                                          for record in run.records]),
                "summary.json": json.dumps(summary, indent=2, allow_nan=False) + "\n"}
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)            # of several processes one writes at a time
        there = run.folder / "records.jsonl"
        if there.is_file() and there.read_bytes().count(b"\n") > len(run.records):
            return False
        for name, content in contents.items():
            temporary = run.folder / f"{name}.{os.getpid()}.tmp"
            try:
                with open(temporary, "w", encoding="utf-8") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, run.folder / name)
            finally:
                temporary.unlink(missing_ok=True)
    return True


def read_run(folder: Path) -> Run:
    """A run of train.py; FileNotFoundError or ValueError name the file, the line and the fault."""
    paths = folder / "config.json", folder / "records.jsonl"
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: is {folder} a run folder of train.py?")
    records, where = [], str(paths[0])
    try:
        config = dict(**json.loads(paths[0].read_bytes()))
        dict(**config.get("facts", {}))                 # an object, where it is there
        for number, line in enumerate(paths[1].read_bytes().splitlines(), 1):
            where = f"{paths[1]}, line {number}"
            fields = dict(**json.loads(line))
            for verdict in {"base", "answer"} & fields.keys():
                fields[verdict] = Verdict(**fields[verdict])
            records.append(Record(**fields))
    except (ValueError, TypeError, RecursionError) as error:    # the second: a field lacks
        raise ValueError(f"{where}: {error}; the run's command writes it again") from None
    return Run(folder, config, records)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of `runs/*`. Beside a run, what is no run folder is passed over, and named."""
    runs, others = [], []
    for folder in folders:
        files = [folder / name for name in ("config.json", "records.jsonl")]
        is_other = folder.exists() and not any([path.is_file() for path in files])
        (others if is_other else runs).append(folder)
    for folder in others if runs else ():
        if folder.name != "stages":
            print(f"{folder}: passed over, it is no run folder", file=sys.stderr)
    return [read_run(folder) for folder in runs or others if folder.name != "stages"]


def adapter_folder(out: str, id: str) -> Path:
    """Where --keep-adapters puts a sample's adapter: adapters/<id> in the run folder; an id that is
    no plain name is replaced by a digest."""
    plain = re.fullmatch(r"\w[\w.-]{,99}", id, re.ASCII)
    return Path(out, "adapters", id if plain else digest(id)[:16])
