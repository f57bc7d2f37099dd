"""The work of ``prepare``, cut into shards that Ray Data writes, each once: what a killed run finished is found again.

    dataset/parts/train/00003.json      while preparing: the account of a shard that is whole, and a fingerprint of what it was made from

Runs in: the driver, which shuffles and cuts and holds no more of an image than its name; a task a shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raypar.config import PrepareConfig
from raypar.dataset.formats import SPLITS, Record, label_file, shapes
from raypar.dataset.ingest import ShardJob, ShardReport, write_shard
from raypar.dataset.manifest import Shard
from raypar.dataset.records import Records
from raypar.dataset.remote import Tree
from raypar.storage import Folder

PARTS = "parts"
SMALL_SPLIT = 200  # images; larger splits get several shards however small the images are,
MIN_SHARDS = 4  # so that several tasks can read them
STAT_THREADS, STAT_CHUNK = 16, 1024


@dataclass(frozen=True)
class Portion:
    """What becomes one shard.

    Attributes:
        path: of the shard in the dataset folder.
        split: its name.
        rows: int64, indices into the split's records, in the order of the shard's rows.
        fingerprint: of the settings, and of all that is known of the images and labels without opening them.
    """

    path: str
    split: str
    rows: NDArray[np.int64]
    fingerprint: str


def portions(
    splits: dict[str, Records],
    template: ShardJob,
    section: PrepareConfig,
    *,
    taken: dict[str, pa.Array],
    first: dict[str, int],
    tree: Tree | None = None,
) -> list[Portion]:
    """Shuffles each split and cuts it into portions of about ``prepare.shard_mb``.

    Args:
        splits: records of unique ids, in any order.
        template: what is the same for all shards.
        section: the run's.
        taken: image ids, large_binary, that are in the dataset already.
        first: the number of the first new shard.
        tree: where the files are, if not on a disk.
    """
    made = []
    for split, records in splits.items():
        order = records.in_order()
        if split in taken:
            is_taken = pc.is_in(records.image_ids.take(pa.array(order)), value_set=taken[split])
            order = order[~is_taken.to_numpy(zero_copy_only=False)]
        order = order[np.random.default_rng([template.seed, SPLITS.index(split)]).permutation(len(order))]
        files = _files(records, order, template, tree)
        for number, part in enumerate(
            cut(files[:, 0], section.shard_mb * 1e6, section.rows_per_group), first.get(split, 0)
        ):
            rows = order[part.start : part.stop]
            path = f"{split}/{number:05d}.parquet"
            made.append(
                Portion(
                    path,
                    split,
                    rows,
                    _fingerprint(records, rows, files[part.start : part.stop], template, path),
                )
            )
    return made


def cut(sizes: NDArray[np.float64], shard_bytes: float, rows_per_group: int) -> list[range]:
    """Cuts rows into shards of about equal bytes, between row groups; every row lands in one shard, in order."""
    if not len(sizes):
        return []
    starts = np.arange(0, len(sizes), rows_per_group)
    groups = np.add.reduceat(np.asarray(sizes, np.float64), starts) + 1.0
    total = groups.sum()
    num_shards = max(1, round(total / shard_bytes))
    if len(sizes) > SMALL_SPLIT:
        num_shards = max(num_shards, min(MIN_SHARDS, len(groups)))
    shard_of = ((np.cumsum(groups) - groups / 2) / total * num_shards).astype(np.int64)
    firsts = starts[np.concatenate([[True], shard_of[1:] != shard_of[:-1]])]
    return [range(int(a), int(b)) for a, b in zip(firsts, [*firsts[1:], len(sizes)], strict=True)]


def _files(
    records: Records, order: NDArray[np.int64], template: ShardJob, tree: Tree | None
) -> NDArray[np.float64]:
    """float64 (N, 3): bytes of each image, and when it and its labels were changed; zeros for what is missing."""
    if template.format == "shapes":
        size = shapes.BYTES_PER_PIXEL * template.shapes_hw[0] * template.shapes_hw[1]
        return np.tile([size, 0.0, 0.0], (len(order), 1))

    def look(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.array([_stat(record, tree) for record in records.take(rows)], np.float64).reshape(-1, 3)

    # a network's file system answers slowly, but to many at once
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        found = list(threads.map(look, [order[i : i + STAT_CHUNK] for i in range(0, len(order), STAT_CHUNK)]))
    return np.concatenate(found) if found else np.zeros((0, 3))


def _stat(record: Record, tree: Tree | None) -> tuple[float, float, float]:
    look = tree.file_info if tree else _info
    labels = label_file(record)
    size, changed_s = look(record.image_path) or (0.0, 0.0)
    return size, changed_s, (look(labels) or (0.0, 0.0))[1] if labels else 0.0


def _info(path: str) -> tuple[float, float] | None:
    try:
        info = os.stat(path)  # noqa: PTH116 (a million of them: without a Path each)
    except (OSError, ValueError):
        return None
    return info.st_size, info.st_mtime


def _fingerprint(
    records: Records, rows: NDArray[np.int64], files: NDArray[np.float64], template: ShardJob, path: str
) -> str:
    settings = {
        k: v for k, v in asdict(replace(template, path=path)).items() if k not in ("dataset", "source")
    }
    digest = hashlib.sha256(json.dumps(settings).encode())
    digest.update(np.ascontiguousarray(files).tobytes())
    digest.update(records.digest(rows))
    return digest.hexdigest()


def finished(dataset: Folder, wanted: list[Portion]) -> dict[str, ShardReport]:
    """Reports, by path, of the shards that an earlier run finished of the same images with the same settings."""
    names = dataset.list(PARTS, recursive=True)
    if not names:
        return {}
    by_part = {_part(portion): portion for portion in wanted}
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        read = dict(zip(names, threads.map(lambda name: _read_part(dataset, name), names), strict=True))
    sizes = {
        path: size
        for split in {portion.split for portion in wanted}
        for path, size in dataset.sizes(split).items()
    }
    found = {}
    for name, part in read.items():
        portion = by_part.get(name)
        if portion is None or part is None or part["fingerprint"] != portion.fingerprint:
            continue
        report = _report(part["report"])
        if report.shard is None or sizes.get(portion.path) == report.shard.num_bytes:
            found[portion.path] = report
    return found


def write(
    due: list[Portion], splits: dict[str, Records], template: ShardJob
) -> Iterator[tuple[Portion, ShardReport]]:
    """Has the shards written, one Ray Data task each; reports in the order in which the tasks end."""
    import ray
    import ray.data

    if not due:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    shared = {split: ray.put(records) for split, records in splits.items()}
    items = [{"number": i, "portion": pickle.dumps(portion)} for i, portion in enumerate(due)]
    listed = ray.data.from_items(items, override_num_blocks=len(items))
    written = listed.map_batches(_write, batch_size=1, fn_args=(shared, template), **_placement(template))  # type: ignore[arg-type]
    for batch in written.iter_batches(batch_size=None, prefetch_batches=0):
        for number, report in zip(batch["number"], batch["report"], strict=True):
            yield due[int(number)], pickle.loads(report)


def _write(batch: dict[str, Any], shared: dict[str, Any], template: ShardJob) -> dict[str, Any]:
    """The task: one row a shard, a pickle in and one out."""
    import ray

    reports = []
    for pickled in batch["portion"]:
        portion: Portion = pickle.loads(pickled)
        records = ray.get(shared[portion.split])
        reports.append(pickle.dumps(write_portion(portion, records, template)))
    return {"number": batch["number"], "report": np.asarray(reports, object)}


def write_portion(portion: Portion, records: Records, template: ShardJob) -> ShardReport:
    """Writes a shard, then its account: where that is, the shard is whole."""
    job = replace(template, path=portion.path, split=portion.split, records=tuple(records.take(portion.rows)))
    report = write_shard(job)
    value = vars(report) | {"shard": report.shard.model_dump() if report.shard else None}
    template.dataset.write(_part(portion), json.dumps({"fingerprint": portion.fingerprint, "report": value}))
    return report


def _part(portion: Portion) -> str:
    return f"{PARTS}/{portion.path.removesuffix('.parquet')}.json"


def _read_part(dataset: Folder, name: str) -> dict[str, Any] | None:
    try:
        return dataset.read_json(name)
    except (OSError, ValueError):  # not ours: the shard is written again
        return None


def _report(value: dict[str, Any]) -> ShardReport:
    counts = Counter({int(class_id): count for class_id, count in value["boxes_per_class"].items()})
    shard = Shard.model_validate(value["shard"]) if value["shard"] else None
    return ShardReport(
        **{**value, "shard": shard, "boxes_per_class": counts, "repairs": Counter(value["repairs"])}
    )


def _placement(template: ShardJob) -> dict[str, Any]:
    """Local files are read and written on the driver's node, whichever node has room for more tasks; a store is reached from any."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if len(nodes) == 1 or (
        (template.format == "shapes" or template.source) and not template.dataset.is_local
    ):
        return {"num_cpus": 1}
    node_id = ray.get_runtime_context().get_node_id()
    here = next((node for node in nodes if node["NodeID"] == node_id), None)
    num_cpus = here["Resources"].get("CPU", 0) if here else 0
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    if num_cpus >= 1:
        return {"num_cpus": 1, "scheduling_strategy": strategy}
    # a head that offers Ray no CPUs
    return {"num_cpus": 0, "concurrency": os.cpu_count() or 1, "scheduling_strategy": strategy}
