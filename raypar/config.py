"""The run file as frozen pydantic models: one class a section, one field a setting.

Runs in: the driver (workers get plain dicts: ``model_dump(mode="json")``). Imports no Ray and no torch.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    StrictBool,
    field_validator,
    model_validator,
)

from raypar.domain import Domain, dotted
from raypar.storage import Folder

VERBS = ("prepare", "inspect", "train", "evaluate", "predict", "export", "serve", "tune")
# Settings of Ultralytics that raypar decides itself, each with the place to write instead.
OWNED_BY_RAYPAR = {
    "model": "train.model", "data": "prepare.source", "batch": "train.batch", "device": "train.use_gpu=true or false", "seed": "seed",
    "project": "storage", "name": "name", "exist_ok": "train.overwrite=true", "resume": "nothing: runs resume by themselves",
    "pretrained": "train.init_from", "workers": "nothing: Ray Data decides", "cache": "train.cache", "amp": "train.precision", "rect": "nothing: batches are square",
    "mode": "the verb", "task": "nothing: it follows from the model", "save_period": "nothing: every epoch ends with a checkpoint",
    "split": "evaluate.split", "source": "predict.source", "format": "export.format",
}  # fmt: skip


TASKS_OF_FORMAT = {
    "yolo": ("detect", "segment", "pose", "obb"), "coco": ("detect", "segment", "pose"), "voc": ("detect",),
    "folders": ("classify",), "shapes": ("detect", "segment", "pose", "obb", "classify"),
}  # fmt: skip


class Section(BaseModel):
    """Settings that cannot be changed after they are read, and among which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ShapesConfig(Section):
    """The built-in generated dataset: circles, squares, triangles and stars on textured backgrounds."""

    train: PositiveInt = Field(400, description="images to generate for training")
    val: PositiveInt = Field(100, description="images to generate for validation")
    test: int = Field(0, ge=0, description="images to generate for testing")
    height: PositiveInt = Field(240, description="px")
    width: PositiveInt = Field(320, description="px")


class PrepareConfig(Section):
    """Images and labels -> checked Parquet shards."""

    source: str | None = Field(
        None,
        description="data.yaml (yolo), folder or JSON (coco), folder (voc, folders): a path or s3://, gs:// ...; nothing for shapes",
    )
    format: Literal["yolo", "coco", "voc", "folders", "shapes"] = Field(
        "yolo", description="how the labels are written; folders: a folder of images for each class"
    )
    task: Literal["auto", "detect", "segment", "pose", "obb", "classify"] = Field(
        "auto",
        description="what to learn; auto: classify for folders, pose where data.yaml has kpt_shape, else detect",
    )
    shapes: ShapesConfig = Field(ShapesConfig(), description="what to generate when format is shapes")
    max_rejected: float = Field(
        0.05, ge=0, le=1, description="share of images that may be set aside before it is an error"
    )
    shard_mb: PositiveFloat = Field(64, description="target size of a shard, MB")
    rows_per_group: PositiveInt = Field(64, description="images in a Parquet row group")
    max_pixels: PositiveInt = Field(
        178_956_970, description="images with more pixels than this are set aside, unread"
    )
    overwrite: bool = Field(False, description="replace a finished dataset instead of keeping it")
    append: bool = Field(False, description="add images that are new in the source to a finished dataset")

    @model_validator(mode="after")
    def _keeps_or_replaces(self) -> Self:
        if self.append and self.overwrite:
            raise ValueError("append keeps what is there and overwrite replaces it: choose one")
        return self

    @model_validator(mode="after")
    def _needs_source(self) -> Self:
        if self.format != "shapes" and self.source is None:
            raise ValueError(f"source is missing: format '{self.format}' needs to know where the images are")
        return self

    @model_validator(mode="after")
    def _format_has_task(self) -> Self:
        tasks = TASKS_OF_FORMAT[self.format]
        if self.task not in ("auto", *tasks):
            raise ValueError(
                f"task '{self.task}' cannot be read from format '{self.format}', which has labels for {', '.join(tasks)}"
            )
        return self


class InspectConfig(Section):
    """Shards -> statistics, pictures, and the speed of the input pipeline."""

    split: Literal["train", "val", "test"] = Field("train", description="which images")
    num_samples: PositiveInt = Field(
        16, le=256, description="images in samples_raw.png and samples_augmented.png"
    )
    seconds: float = Field(
        4.0, ge=0, description="to time the pipeline for, on one core and on all; 0: no speed is measured"
    )
    overwrite: bool = Field(False, description="inspect again though the report is there")


class NumWorkers(Section):
    """An elastic number of training workers."""

    min: PositiveInt = Field(description="training goes on with so many when others are lost")
    max: PositiveInt = Field(description="it takes so many when they can be had")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class TrainConfig(Section):
    """A dataset and a model -> trained weights."""

    model: str = Field(
        "yolov8n.yaml", description="a model yaml (from scratch) or weights (.pt) to start from"
    )
    init_from: str | None = Field(
        None,
        description="weights (.pt, URI) that a model yaml takes over layer by layer, where they fit; nothing: random ones",
    )
    num_workers: PositiveInt | NumWorkers = Field(
        1,
        description="training workers, or {min, max} to go on with what is there; each takes one GPU or a share of the CPUs",
    )
    use_gpu: StrictBool | Literal["auto"] = Field(
        "auto", description="auto takes GPUs when the cluster has enough of them"
    )
    cpus_per_worker: PositiveFloat | None = Field(
        None, description="CPUs Ray reserves for each worker; nothing: 1"
    )
    threads_per_worker: PositiveInt | None = Field(
        None, description="torch threads a worker; nothing: its share of the node's cores"
    )
    batch: PositiveInt = Field(16, description="images a step over all workers together, as in Ultralytics")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: fp16 on a GPU, bf16 on a CPU that has it"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="how workers share the model; ddp: each holds all of it; fsdp: each holds a share, for models that outgrow one device",
    )
    sync_bn: bool = Field(
        False, description="batch norm by the statistics of all workers' images; for few images a worker"
    )
    augment: Literal["auto", "cpu", "gpu"] = Field(
        "auto",
        description="where to augment; cpu: in Ray Data tasks; gpu: on the training workers' devices, which decode too; auto: gpu if they are GPUs and it can be had",
    )
    cache: Literal["none", "ram", "disk"] = Field(
        "none", description="keep decoded images between epochs, once a node"
    )
    cache_gb: float | None = Field(
        None,
        gt=0,
        description="of a node; nothing: a quarter of its memory, or half of what is free on its disk",
    )
    albumentations: list[dict[str, Any]] | str | None = Field(
        None, description="transforms as [{Blur: {p: 0.1}}, ...] or an importable function 'pkg.module:make' that returns them; nothing: Ultralytics' four"
    )  # fmt: skip
    max_failures: int = Field(3, ge=-1, description="how many times lost workers are replaced; -1: no limit")
    max_nan_restarts: int = Field(
        3,
        ge=0,
        description="how many times a loss that is not finite sends training back to its checkpoint, at half the learning rate",
    )
    checkpoint_every_s: PositiveFloat = Field(
        600, description="seconds between checkpoints within an epoch; each epoch ends with one too"
    )
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept")
    collective_timeout_s: PositiveFloat = Field(
        300, description="seconds a rank waits for the others before the run fails"
    )
    placement_timeout_s: PositiveFloat = Field(
        300, description="seconds to wait for a place for every worker"
    )
    storage_timeout_s: PositiveFloat = Field(
        300, description="seconds a storage that fails is tried again before the run fails"
    )
    overwrite: bool = Field(
        False, description="start anew instead of resuming or keeping a finished training"
    )
    yolo: dict[str, Any] = Field(
        default_factory=dict,
        description="Ultralytics' own settings, unchanged (epochs, imgsz, lr0, mosaic ...)",
    )

    @field_validator("yolo")
    @classmethod
    def _not_owned(cls, yolo: dict[str, Any]) -> dict[str, Any]:
        for key in yolo:
            if key in OWNED_BY_RAYPAR:
                raise ValueError(f"'{key}' is raypar's: write {OWNED_BY_RAYPAR[key]}")
        return yolo

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.batch % self.max_workers:
            raise ValueError(
                f"batch {self.batch} cannot be shared equally by {self.max_workers} workers: make it a multiple of {self.max_workers}"
            )
        return self

    @model_validator(mode="after")
    def _compiles_plain_models(self) -> Self:
        if self.yolo.get("compile") and (self.parallel == "fsdp" or self.sync_bn):
            raise ValueError(
                "yolo.compile goes with neither parallel=fsdp nor sync_bn: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _starts_from_one_thing(self) -> Self:
        if self.init_from is not None and not self.model.endswith((".yaml", ".yml")):
            raise ValueError(
                f"init_from fills a model yaml with weights, and model {self.model} has its own: keep one of them"
            )
        return self

    @property
    def min_workers(self) -> int:
        """Below so many workers there is no training."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers.min

    @property
    def max_workers(self) -> int:
        """Workers when all can be had."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers.max

    @property
    def world_sizes(self) -> list[int]:
        """Numbers of workers that can share the batch equally, ascending."""
        return [n for n in range(self.min_workers, self.max_workers + 1) if self.batch % n == 0]


class InferenceConfig(Section):
    """What every user of the detector can set."""

    weights: str | None = Field(None, description=".pt or exported model; nothing: this run's train/best.pt")
    imgsz: PositiveInt | None = Field(None, description="px of the longer side; nothing: as trained")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("fp32", description="of the forward pass")
    use_gpu: StrictBool | Literal["auto"] = Field(
        "auto", description="auto takes a GPU when the cluster has one"
    )
    iou: float = Field(0.7, ge=0, le=1, description="overlap above which NMS drops the weaker box")
    max_det: PositiveInt = Field(300, description="boxes kept an image")


class EvaluateConfig(InferenceConfig):
    """Weights and a split -> metrics and pictures."""

    split: Literal["train", "val", "test"] = Field("val", description="which images")
    conf: float = Field(0.001, ge=0, le=1, description="boxes below this confidence are dropped")
    batch: PositiveInt = Field(16, description="images a forward pass")
    num_workers: PositiveInt = Field(1, description="detector processes")
    overwrite: bool = Field(False, description="evaluate again though the result is there")


class PredictConfig(InferenceConfig):
    """Weights and images -> detections in Parquet."""

    source: str | None = Field(
        None,
        description="folder, glob, image, .txt of paths or Parquet shards, also as s3://, gs:// ...; nothing: the dataset's val split",
    )
    conf: float = Field(0.25, ge=0, le=1, description="boxes below this confidence are dropped")
    batch: PositiveInt = Field(16, description="images a forward pass")
    max_pixels: PositiveInt = Field(
        178_956_970, description="images with more pixels than this are rejected, undecoded"
    )
    num_workers: PositiveInt = Field(1, description="detector processes")
    overwrite: bool = Field(False, description="predict again though the result is there")


class ExportConfig(Section):
    """Weights -> a format that other runtimes load."""

    weights: str | None = Field(None, description=".pt; nothing: this run's train/best.pt")
    format: Literal["onnx", "torchscript", "openvino", "engine"] = Field(
        "onnx", description="as Ultralytics names it"
    )
    imgsz: PositiveInt | None = Field(None, description="px; nothing: as trained")
    dynamic: bool = Field(True, description="accept any batch and image size, where the format can")
    half: bool = Field(False, description="fp16 weights")
    overwrite: bool = Field(False, description="export again though the result is there")


class Autoscaling(Section):
    """How many replicas serve."""

    min: PositiveInt = 1
    max: PositiveInt = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class ServeConfig(InferenceConfig):
    """Weights -> an HTTP service."""

    conf: float = Field(0.25, ge=0, le=1, description="default of the query parameter conf")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every one")
    port: int = Field(8000, ge=1, le=65535, description="TCP port")
    num_replicas: PositiveInt | Autoscaling = Field(
        1, description="detector replicas, or {min, max} to follow the load"
    )
    num_gpus: float = Field(1.0, gt=0, description="share of a GPU a replica takes, when use_gpu holds")
    num_cpus: float = Field(1.0, gt=0, description="CPUs Ray reserves for a replica")
    max_batch_size: PositiveInt = Field(16, description="images joined in one forward pass")
    batch_wait_s: float = Field(
        0.0, ge=0, description="seconds an image waits, from its arrival, for others to fill its batch; 0: an idle model starts at once"
    )  # fmt: skip
    max_queued_requests: PositiveInt = Field(256, description="requests that may wait; more are answered 503")
    request_timeout_s: PositiveFloat = Field(
        30, description="seconds until a request is given up; a forward pass that takes longer has its replica replaced"
    )  # fmt: skip
    max_image_mb: PositiveFloat = Field(16, description="larger bodies are answered 413")
    max_pixels: PositiveInt = Field(50_000_000, description="larger images are answered 413, undecoded")
    max_held_mb: PositiveFloat = Field(
        1024, description="encoded images that may be held at a time, by each ingress; more are answered 503"
    )
    api_key_env: str | None = Field(
        None, description="environment variable with the accepted API keys, comma separated; nothing: open"
    )
    route_prefix: str = Field("/", description="path under which the service answers", pattern=r"^/[^{}]*$")
    threads_per_replica: PositiveInt | None = Field(
        None, description="torch threads a replica on a CPU; nothing: its share of the node's cores"
    )


class TuneConfig(Section):
    """A dataset and a search space -> the settings that train best."""

    space: dict[str, Domain] = Field(
        default_factory=dict, description="setting: {uniform, quniform, loguniform, randint or choice: [...]}, e.g. train.yolo.lr0: {loguniform: [1e-4, 1e-1]}"
    )  # fmt: skip
    num_trials: PositiveInt = Field(
        20, description="trainings in all; raise it and give the command again for more"
    )
    max_concurrent: PositiveInt | None = Field(
        None, description="trials at a time; nothing: as many as the cluster has room for"
    )
    search: Literal["auto", "optuna", "random"] = Field(
        "auto", description="who chooses settings; auto: optuna where it is installed, else random"
    )
    metric: str = Field(
        "fitness",
        description="of metrics.jsonl, the larger the better, in the trial's best epoch: fitness, map50, map50_95, top1 ...",
    )
    scheduler: Literal["asha", "none"] = Field(
        "asha", description="asha stops trials early that lag behind the others at the same epoch"
    )
    grace_epochs: PositiveInt = Field(3, description="epochs that asha leaves every trial")
    reduction_factor: int = Field(3, ge=2, description="asha lets one of so many trials go on at each halt")
    overwrite: bool = Field(
        False, description="start anew instead of going on with the trials that are there"
    )

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, space: Any) -> Any:
        return dotted(space)


class RunConfig(Section):
    """The whole run file."""

    name: str = Field(
        description="of the run; its folder in storage", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"
    )
    storage: str = Field("runs", description="local folder or URI (s3://bucket/prefix) that holds the runs")
    seed: int = Field(0, ge=0, description="of every random choice")
    dataset: str | None = Field(
        None, description="a dataset that another run prepared, as runs/bccd/dataset; nothing: this run's own"
    )
    weights_trusted: bool = Field(
        False,
        description="let weights (.pt) run Python code that they hold: only if you trust whoever made them",
    )
    prepare: PrepareConfig | None = Field(None, description="images and labels -> shards")
    inspect: InspectConfig = Field(InspectConfig(), description="shards -> statistics, pictures, speed")
    train: TrainConfig = Field(TrainConfig(), description="shards -> weights")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="weights -> metrics")
    predict: PredictConfig = Field(PredictConfig(), description="weights + images -> detections")
    export: ExportConfig = Field(ExportConfig(), description="weights -> ONNX ...")
    serve: ServeConfig = Field(ServeConfig(), description="weights -> HTTP service")
    tune: TuneConfig = Field(TuneConfig(), description="shards -> the settings that train best")

    @property
    def folder(self) -> Folder:
        """``{storage}/{name}``, where every verb writes."""
        return Folder.at(self.storage) / self.name

    @property
    def dataset_folder(self) -> Folder:
        """Where the shards are that every verb but ``prepare`` reads."""
        return self.folder / "dataset" if self.dataset is None else Folder.at(self.dataset)
