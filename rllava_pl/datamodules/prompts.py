"""Prompts from files and data sets of your own, every row checked before training starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rllava_pl.datamodules.base import BaseDataModule
from rllava_pl.datamodules.images import MIB, ImageReader
from rllava_pl.datamodules.rejections import DataError, Rejection, RowError, count_codes
from rllava_pl.datamodules.schema import ParsedRow, RowSchema
from rllava_pl.datamodules.tables import Table, as_row, is_remote, open_table
from rllava_pl.types import Prompt

CountTokens = Callable[[Prompt], int]


@dataclass(frozen=True)
class PromptSource:
    """One table with everything needed to turn its rows into prompts."""

    table: Table
    schema: RowSchema
    images: ImageReader

    def parse(self, row: int) -> ParsedRow:
        """Text and image references of a row."""
        return self.schema.parse(as_row(self.table.rows[row]), f"{self.table.name}:{row}")

    def check(self, row: int) -> ParsedRow:
        """The same, and make sure its images can be read."""
        parsed = self.parse(row)
        for field, ref in self._image_fields(parsed):
            self.images.check(ref, field)
        return parsed

    def prompt(self, row: int) -> Prompt:
        """The prompt with its images decoded."""
        parsed = self.parse(row)
        images = tuple(self.images.load(ref, field) for field, ref in self._image_fields(parsed))
        where = f"{self.table.source} row {row}"
        return Prompt(
            uid=parsed.uid,
            messages=parsed.messages,
            images=images,
            answer=parsed.answer,
            target=parsed.target,
            rejected=parsed.rejected,
            metadata=parsed.metadata,
            source=where,
        )

    def _image_fields(self, parsed: ParsedRow) -> Iterator[tuple[str, object]]:
        column = self.schema.column("images")
        return ((f"{column}[{k}]", ref) for k, ref in enumerate(parsed.images))


class PromptRows(Sequence[Prompt]):
    """The usable rows of some sources; a prompt is built, and its images decoded, when it is asked for.

    Args:
        sources: Joined in their order.
        max_prompt_tokens: Longest prompt; 0 does not measure.
        count_tokens: Length of a prompt in tokens, needed with ``max_prompt_tokens``.
    """

    def __init__(
        self, sources: Sequence[PromptSource], max_prompt_tokens: int = 0, count_tokens: CountTokens | None = None
    ) -> None:
        self.sources = tuple(sources)
        self.rejections: list[Rejection] = []
        """Every refused row; ``len(self) + len(self.rejections) == self.total``."""
        self.total = sum(len(source.table.rows) for source in sources)
        self.slots_added = 0
        """Rows whose image slots were put in front of the text (W01)."""
        self.filled: Counter[str] = Counter()
        """Number of usable rows that have a ``target``, and that have a ``rejected`` response."""
        self._kept: list[tuple[int, int]] = []
        self._audit(max_prompt_tokens, count_tokens)

    def _audit(self, max_prompt_tokens: int, count_tokens: CountTokens | None) -> None:
        seen: dict[str, str] = {}
        for s, source in enumerate(self.sources):
            for row in range(len(source.table.rows)):
                try:
                    parsed = source.check(row)
                    _check_unique(parsed.uid, seen, f"{source.table.source} row {row}", source.schema.column("id"))
                    if count_tokens is not None and max_prompt_tokens > 0:
                        _check_length(count_tokens(source.prompt(row)), max_prompt_tokens)
                except RowError as error:
                    self.rejections.append(error.at(source.table.source, row))
                else:
                    self._kept.append((s, row))
                    self.slots_added += parsed.slots_added
                    self.filled.update(target=bool(parsed.target), rejected=bool(parsed.rejected))

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        s, row = self._kept[index]
        source = self.sources[s]
        try:
            return source.prompt(row)
        except RowError as error:  # the file changed after the audit
            raise DataError([error.at(source.table.source, row)], self.total) from error


class PromptDataModule(BaseDataModule):
    """Prompts from JSONL, JSON, CSV, Parquet and Arrow files, saved data sets, or the Hugging Face hub.

    A row has ``prompt`` (text, ``<image>`` marks the place of an image) or ``messages`` (a list of role and content),
    ``images`` (paths below ``image_root``, or bytes; one or a list), ``answer`` and optionally ``id``, ``target`` (a
    response worth imitating) and ``rejected`` (the worse response of a pair). Other columns become ``metadata``. A
    source is a file, a folder of ``Dataset.save_to_disk``, or ``owner/name:config@split`` on the hub.

    Every row of a split is checked in ``setup``: text, slots, and images by header and by decoding them once. Images
    are decoded again when a batch needs them, so memory does not grow with the data.

    Args:
        train: Sources of the training split.
        val: Sources of the validation split; none means no validation.
        test: Sources of the test split, also used to predict.
        columns: Field to column, e.g. ``{prompt: problem, images: image, answer: solution}``.
        image_root: Folder of the image paths, which may not leave it; by default the folder of the source file.
        system_prompt: Put before rows that have a ``prompt`` column.
        template: Text around the ``prompt`` column; contains ``{prompt}`` once.
        require_answer: Refuse rows without an answer.
        require_target: Refuse rows without a target; SFT needs one in every row, and often no answer.
        require_rejected: Refuse rows that are no pair of a target and a rejected response; DPO needs pairs.
        max_image_pixels: Largest width x height of an image.
        max_image_mib: Largest image file in MiB.
        max_prompt_tokens: Longest prompt in tokens, image tokens included; 0 does not measure.
        processor_path: Model whose processor and chat template measure the prompts; needed by ``max_prompt_tokens``.
        max_reject_fraction: Share of rows that may be refused, counted and left out; above it ``setup`` raises.
        batch_size: Prompts of one rollout on each rank.
        val_batch_size: Prompts of one validation, test or prediction batch on each rank.
        num_workers: Processes that prepare prompts ahead; 0 prepares them in the training process.
        seed: Seed of the training order.
    """

    def __init__(
        self,
        train: list[str] | str = "",
        val: list[str] | str = "",
        test: list[str] | str = "",
        columns: dict[str, str] | None = None,
        image_root: str = "",
        system_prompt: str = "",
        template: str = "{prompt}",
        require_answer: bool = True,
        require_target: bool = False,
        require_rejected: bool = False,
        max_image_pixels: int = 40_000_000,
        max_image_mib: float = 64.0,
        max_prompt_tokens: int = 0,
        processor_path: str = "",
        max_reject_fraction: float = 0.0,
        batch_size: int = 32,
        val_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers, seed)
        if not 0 <= max_reject_fraction < 1:
            raise ValueError(f"max_reject_fraction is {max_reject_fraction}; it is a share from 0 to below 1")
        if image_root and not Path(image_root).expanduser().is_dir():
            raise FileNotFoundError(f"image_root {image_root!r} is not a folder")
        if max_prompt_tokens and not processor_path:
            raise ValueError(
                f"max_prompt_tokens is {max_prompt_tokens}, but processor_path names no model to measure by"
            )
        self.specs = {"train": _as_list(train), "val": _as_list(val), "test": _as_list(test)}
        self.schema = RowSchema(
            columns or {}, system_prompt, template, require_answer, require_target, require_rejected
        )
        self.image_root = image_root
        self.max_image_pixels = max_image_pixels
        self.max_image_bytes = int(max_image_mib * MIB)
        self.max_prompt_tokens = max_prompt_tokens
        self.processor_path = processor_path
        self.max_reject_fraction = max_reject_fraction

    def prepare_data(self) -> None:
        """Download hub data sets, in one process."""
        for spec in {spec for specs in self.specs.values() for spec in specs if is_remote(spec)}:
            open_table(spec)

    def setup(self, stage: str) -> None:
        """Read and check the splits of this stage.

        Raises:
            DataError: More rows than ``max_reject_fraction`` allows cannot be used.
            ValueError: The stage needs a split that has no source.
        """
        if stage == "fit":
            self.train_prompts = self.train_prompts or self.read("train")
        if stage in ("fit", "validate") and (self.specs["val"] or stage == "validate"):
            self.val_prompts = self.val_prompts or self.read("val")
        if stage in ("test", "predict"):
            self.test_prompts = self.test_prompts or self.read("test")

    def read(self, split: str) -> PromptRows:
        """Usable rows of ``train``, ``val`` or ``test``; what was refused is in their ``rejections``.

        Raises:
            DataError: More rows than ``max_reject_fraction`` allows cannot be used.
            ValueError: The split has no source or no row, or ``columns`` maps responses that no training row has.
        """
        rows = self.audit(split)
        if not rows.total:
            raise ValueError(f"the {split} split has no rows: {', '.join(self.specs[split])}")
        if len(rows.rejections) > self.max_reject_fraction * rows.total:
            raise DataError(rows.rejections, rows.total)
        if rows.rejections:
            rank_zero_warn(
                f"{split}: left out {len(rows.rejections)} of {rows.total} rows ({count_codes(rows.rejections)})"
            )
        self._report_responses(split, rows)
        if rows.slots_added:
            rank_zero_info(f"{split}: put <image> slots in front of the text of {rows.slots_added} rows (W01)")
        return rows

    def _report_responses(self, split: str, rows: PromptRows) -> None:
        """Rows may lack responses, but a mapped column that no training row has is a slip of the pen."""
        for name, count in rows.filled.items():
            if not count and split == "train" and name in self.schema.columns:
                column = self.schema.column(name)
                raise ValueError(f"columns maps {name} to {column!r}, but no row of the train split has text there")
            if 0 < count < len(rows):
                rank_zero_info(f"{split}: {count} of {len(rows)} rows have a {name}")

    def audit(self, split: str) -> PromptRows:
        """Check every row of a split; raises for none of them, see ``PromptRows.rejections``."""
        if not self.specs[split]:
            raise ValueError(f"there is no source for the {split} split; set {split} to a file or data set")
        sources = [self._source(open_table(spec)) for spec in self.specs[split]]
        return PromptRows(sources, self.max_prompt_tokens, self._token_counter())

    def _source(self, table: Table) -> PromptSource:
        root = Path(self.image_root).expanduser() if self.image_root else table.folder
        return PromptSource(table, self.schema, ImageReader(root, self.max_image_pixels, self.max_image_bytes))

    def _token_counter(self) -> CountTokens | None:
        """Prompt length by the model's own processor; None without a limit."""
        if not self.max_prompt_tokens:
            return None
        from rllava_pl.models.encoding import encode
        from rllava_pl.models.processors import load_processor

        processor = load_processor(self.processor_path)
        return lambda prompt: len(encode(processor, [prompt])[0])


def _as_list(sources: list[str] | str) -> list[str]:
    if isinstance(sources, str):
        return [sources] if sources else []
    return list(sources)


def _check_unique(uid: str, seen: dict[str, str], where: str, column: str) -> None:
    if uid in seen:
        raise RowError("E15", column, f"{uid!r} is already the id of {seen[uid]}; ids must be unique in a split")
    seen[uid] = where


def _check_length(tokens: int, limit: int) -> None:
    if tokens > limit:
        raise RowError("E14", "prompt", f"has {tokens} tokens after the chat template; max_prompt_tokens is {limit}")
