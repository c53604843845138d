"""Prompts from your files and data sets, every row checked before training starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rllava_pl.datamodules.answers import AnswerKind
from rllava_pl.datamodules.audit import Audit, PromptSource, audit
from rllava_pl.datamodules.base import BaseDataModule
from rllava_pl.datamodules.images import FORMATS, MIB, Animations, ImageFormat, ImageReader
from rllava_pl.datamodules.model_checks import ModelChecks, SpecialTokenPolicy
from rllava_pl.datamodules.rejections import CODES, DataError, Rejection, RowError, count_codes, write_report
from rllava_pl.datamodules.schema import RowSchema
from rllava_pl.datamodules.tables import LazySequence, is_remote, open_table
from rllava_pl.types import Prompt


class PromptRows(LazySequence[Prompt]):
    """The usable rows of some sources; a prompt is built, and its images decoded, on access.

    ``rejections`` are the refused rows, ``total`` counts all, and ``repairs`` and ``filled`` are those of the audit.

    Args:
        sources: Joined in their order.
        audit: The result for each of their rows.
    """

    def __init__(self, sources: Sequence[PromptSource], audit: Audit) -> None:
        self.sources, self.audit = tuple(sources), audit
        self.rejections, self.total = audit.rejections, audit.total
        self.repairs, self.filled = audit.repairs, audit.filled

    def __len__(self) -> int:
        return len(self.audit.kept)

    def responses(self, name: str) -> Iterator[tuple[str, str]]:
        """Where each usable row stands, and its ``target`` or ``rejected`` text; no image is opened."""
        for s, row in self.audit.kept:
            prompt = self.sources[s].parse(row).prompt
            yield prompt.source, getattr(prompt, name)

    def item(self, index: int) -> Prompt:
        """The prompt of a usable row."""
        s, row = self.audit.kept[index]
        source = self.sources[s]
        try:
            return source.prompt(row)
        except RowError as error:  # the file changed after the audit
            raise DataError([source.rejection(row, error)], self.total) from error
        except Exception as error:
            error.add_note(f"while reading {source.table.source} row {row}")
            raise


class PromptDataModule(BaseDataModule):
    """Prompts from JSONL, JSON, CSV, Parquet and Arrow files, saved data sets, or the Hugging Face hub.

    A row has ``prompt`` (text, ``<image>`` marks the place of an image) or ``messages`` (a list of role and content),
    ``images`` (paths below ``image_root``, or bytes; one or a list), ``answer`` and optionally ``id``, ``target`` (a
    response worth imitating) and ``rejected`` (the worse response of a pair). Other columns become ``metadata``. A
    source is a file, a folder of ``Dataset.save_to_disk``, or ``owner/name:config@split`` on the hub.

    Every row of a split is checked in ``setup``: text, slots, images by header and by decoding them once, and with the
    model's processor, if it is known, special tokens, chat template and lengths. Rows that cannot be used are reported,
    counted and left out; too many of them stop the run. Images are decoded again when a batch needs them, so memory
    does not grow with their number. ``python -m rllava_pl check-data`` does the same without training.

    Args:
        train: Sources of the training split.
        val: Sources of the validation split; none means no validation.
        test: Sources of the test split, also used to predict.
        columns: Field to column, e.g. ``{prompt: problem, images: image, answer: solution}``.
        image_root: Folder of the image paths, which may not leave it; by default the folder of the source file.
        system_prompt: Put before rows that have a ``prompt`` column.
        template: Text around the ``prompt`` column; must contain ``{prompt}`` once.
        require_answer: Refuse rows without an answer.
        require_target: Refuse rows without a target; SFT needs one in every row, and often no answer.
        require_rejected: Refuse rows without a target or without a rejected response; DPO needs both.
        answer_kind: Refuse answers that are not a ``number``, ``integer``, ``box`` ([x1, y1, x2, y2]) or ``json``;
            ``text`` accepts any.
        match_targets: Refuse rows whose target has another ``<answer>`` than the row.
        special_tokens: How texts that spell special tokens of the model are treated: ``escape`` reads them as plain
            text, ``reject`` refuses the row, ``allow`` reads them as these tokens, except those of images.
        image_formats: Formats that may be decoded.
        animations: ``reject`` refuses rows with an animated image, ``first_frame`` reads its first frame.
        max_image_pixels: Largest width x height of an image; less for WebP and progressive JPEGs, which take more
            memory to decode.
        max_image_mib: Largest image file in MiB.
        resize_above_pixels: Larger images are scaled down to this many pixels; 0 keeps their size. Labels in pixels
            then refer to another size: normalise them, or set 0.
        max_prompt_tokens: Longest prompt in tokens, image tokens included; 0 does not measure.
        max_target_tokens: Longest target or rejected response in tokens, end token included; 0 does not measure.
        processor_path: Model whose processor checks and measures the prompts.
        max_reject_fraction: Share of rows that may be refused and left out; above it ``setup`` raises.
        report: File for the refused rows, as JSON lines, with ``{split}`` in its name where there are several splits;
            by default ``rejected_<split>.jsonl`` in the folder of the run.
        **loader_options: Those of ``BaseDataModule``.
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
        answer_kind: AnswerKind = "text",
        match_targets: bool = False,
        special_tokens: SpecialTokenPolicy = "escape",
        image_formats: Sequence[ImageFormat] = FORMATS,
        animations: Animations = "reject",
        max_image_pixels: int = 40_000_000,
        max_image_mib: float = 64.0,
        resize_above_pixels: int = 4_194_304,
        max_prompt_tokens: int = 0,
        max_target_tokens: int = 0,
        processor_path: str = "",
        max_reject_fraction: float = 0.01,
        report: str = "",
        **loader_options: int,
    ) -> None:
        super().__init__(**loader_options)
        if special_tokens not in (policies := get_args(SpecialTokenPolicy)):
            raise ValueError(f"special_tokens is {special_tokens!r}; it is one of {', '.join(policies)}")
        if not 0 <= max_reject_fraction < 1:
            raise ValueError(f"max_reject_fraction is {max_reject_fraction}; it is a share from 0 to below 1")
        if image_root and not Path(image_root).expanduser().is_dir():
            raise FileNotFoundError(f"image_root {image_root!r} is not a folder")
        measured: dict[str, object] = {"max_prompt_tokens": max_prompt_tokens, "max_target_tokens": max_target_tokens}
        measured |= {"special_tokens": "reject"} if special_tokens == "reject" else {}
        for name, value in measured.items():
            if value and not processor_path:
                raise ValueError(f"{name} is {value}, but processor_path names no model to measure with")
        splits = {"train": train, "val": val, "test": test}
        self.specs = {name: [x] if isinstance(x, str) and x else list(x) for name, x in splits.items()}
        self.schema = RowSchema(
            columns=columns or {},
            system_prompt=system_prompt,
            template=template,
            require_answer=require_answer,
            require_target=require_target,
            require_rejected=require_rejected,
            answer_kind=answer_kind,
            match_targets=match_targets,
            markup=special_tokens == "allow",
        )
        self.image_root = image_root
        limits = (max_image_pixels, int(max_image_mib * MIB))
        self.images = ImageReader(None, *limits, tuple(image_formats), animations, resize_above_pixels)
        self.special_tokens, self.processor_path = special_tokens, processor_path
        self.max_prompt_tokens, self.max_target_tokens = max_prompt_tokens, max_target_tokens
        self.max_reject_fraction, self.report = max_reject_fraction, report

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
        """Usable rows of ``train``, ``val`` or ``test``; refused ones are in ``rejections``.

        Raises:
            DataError: More rows than ``max_reject_fraction`` allows cannot be used.
            ValueError: The split has no source or no row, or ``columns`` maps responses that no training row has.
        """
        rows = self.audit(split)
        if not rows.total:
            raise ValueError(f"the {split} split has no rows: {', '.join(self.specs[split])}")
        report = self._write_report(split, rows.rejections)
        if len(rows.rejections) > self.max_reject_fraction * rows.total:
            raise DataError(rows.rejections, rows.total, report)
        if rows.rejections:
            counts, where = count_codes(rows.rejections), f"; see {report}" * bool(report)
            rank_zero_warn(f"{split}: left out {len(rows.rejections)} of {rows.total} rows ({counts}){where}")
        for name in ("target", "rejected"):
            count = rows.filled[name]
            if not count and split == "train" and name in self.schema.columns:
                column = self.schema.column(name)
                raise ValueError(f"columns maps {name} to {column!r}, but no row of the train split has text there")
            if 0 < count < len(rows):
                rank_zero_info(f"{split}: {count} of {len(rows)} rows have a {name}")
        for code, count in sorted(rows.repairs.items()):
            rank_zero_info(f"{split}: {count} of {rows.total} rows: {CODES[code]} ({code})")
        return rows

    def _write_report(self, split: str, rejections: Sequence[Rejection]) -> str:
        """Write the refused rows, if there are any and a folder for them; returns the path or ""."""
        if not rejections or not (self.report or self.trainer):
            return ""
        path = Path(self.report.replace("{split}", split))
        if self.trainer is not None and not self.report:
            path = Path(self.trainer.log_dir or self.trainer.default_root_dir) / f"rejected_{split}.jsonl"
        if self.trainer is None or self.trainer.is_global_zero:
            write_report(path, rejections)
        return str(path)

    def audit(self, split: str) -> PromptRows:
        """Check every row of a split without raising for any; see ``PromptRows.rejections``.

        Within a run the ranks share the work, so all of them must call it.

        Raises:
            ValueError: The split has no source, or one cannot be read at all.
        """
        sources = self.sources(split)
        audited = audit(sources, all_ranks=self.trainer is not None)
        return PromptRows([replace(source, model=None) for source in sources], audited)  # workers need no processor

    def sources(self, split: str) -> list[PromptSource]:
        """The opened sources of a split."""
        if not self.specs[split]:
            raise ValueError(f"there is no source for the {split} split; set {split} to a file or data set")
        checks = None
        if self.processor_path:
            from rllava_pl.models.processors import load_processor

            limits = (self.max_prompt_tokens, self.max_target_tokens)
            checks = ModelChecks(load_processor(self.processor_path), self.special_tokens, *limits)
        root = Path(self.image_root).expanduser() if self.image_root else None
        sources, seen = list[PromptSource](), Counter[str]()
        for table in map(open_table, self.specs[split]):
            seen[table.name] += 1
            if seen[table.name] > 1:  # ids begin with the name: a second train becomes train-2
                table = replace(table, name=f"{table.name}-{seen[table.name]}")
            images = replace(self.images, root=root or table.folder)
            sources.append(PromptSource(table, self.schema, images, checks))
        return sources
