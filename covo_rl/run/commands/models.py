"""`covo-rl models`: the families and shipped checkpoints, what a name or folder is, whether a family is exact.

    covo-rl models list                   families, and models of covo_rl's own
    covo-rl models show NAME              a family, or what a folder is by its files alone; `covo-rl models NAME` too
    covo-rl models check PATH             the ten points of covo_rl/run/conformance on a checkpoint
    covo-rl models create --llm PATH --encoder PATH --output DIR     a Covo-Audio for pre-training

`list` and `show` load no weights: their names, shapes and precision stand in the heads of the safetensors files.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from covo_rl.config import AdapterConfig
from covo_rl.data.files import read_record
from covo_rl.models.builtin import builtin_names, resolve_model
from covo_rl.records.console import console, summary_table
from covo_rl.records.folder import BEGUN
from covo_rl.resolve import BUILTIN, folders
from covo_rl.types import UserError, user_errors, visible

Rows = list[tuple[str, Any]]
#: of each of these a model folder has one
TEXT_FILES = (("tokenizer.json", "tokenizer.model", "vocab.json"), ("tokenizer_config.json",),
              ("processor_config.json", "preprocessor_config.json"))  # fmt: skip


class DamagedModel(UserError, ValueError):
    """Files are missing, or cut short."""


class ShowByDefault(TyperGroup):
    """A first word that is no command is what `show` is asked for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0] if args and args[0] in self.commands else "show"
        return word, self.commands[word], args[1:] if args and args[0] in self.commands else args


app = typer.Typer(
    cls=ShowByDefault, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Families and models: what there is, what one is, whether it is exact.",
)  # fmt: skip
FamilyOption = Annotated[str | None, typer.Option("--family", help="a family of your own: ./mine.py:Class")]


@app.callback(invoke_without_command=True)
def begin(context: typer.Context) -> None:
    """List, show and check model families; without a word: list."""
    if context.invoked_subcommand is None:
        models_command()


@app.command("list")
def list_command() -> None:
    """The families by model_type, and the models that covo_rl brings."""
    models_command()


@app.command("show")
def models_command(
    name: Annotated[
        str | None, typer.Argument(help="a family, or a model, adapter or run folder, hub name, builtin:tiny")
    ] = None,
) -> None:
    """Say what NAME is: family, parameters, what would train, missing files. No weights are loaded."""
    from covo_rl.models.registry import family_types

    with user_errors("covo-rl models", code=1):
        if name is None:
            _list()
        elif name in family_types() and not Path(name).exists():
            console.print(summary_table(f"{name}: a family", _family(name)))
        else:
            _show(name)


def _show(path: str) -> None:
    folder = Path(resolve_model(path))
    if (folder / "adapter_config.json").is_file():
        title, rows, problems = "a PEFT adapter", *_adapter(folder)
    elif all((folder / name).is_file() for name in BEGUN):
        title, rows, problems = "a run", *_run(folder)
    else:
        title, rows, problems = "a model", *_model(str(folder))
    console.print(summary_table(f"{visible(path)}: {title}", rows))
    if problems:
        raise DamagedModel("\n  - ".join([f"{path} cannot be used as it is:", *problems]))


@app.command("check")
def check_exactness(
    path: Annotated[str, typer.Argument(help="model folder, hub name, builtin:NAME; with --random also a family")],
    random: Annotated[bool, typer.Option("--random", help="a tiny random model of the same family instead")] = False,
    family: FamilyOption = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 (held to exact limits), bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    exports: Annotated[
        bool | None, typer.Option(help="adapter and merged, in a fresh process; default: up to 2 GB of weights")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="run code of the checkpoint")] = False,
) -> None:
    """Hold a model to the ten points of the conformance suite; the exit code is 1 where one fails."""
    from covo_rl.models import use_family
    from covo_rl.run.conformance.command import check_checkpoint, tiny_of

    with user_errors("covo-rl models check", code=1):
        use_family(family, None if random else resolve_model(path))
        model = tiny_of(path) if random else path
        outcomes = check_checkpoint(
            model, dtype=dtype, device=device, exports=exports, trust_remote_code=trust_remote_code
        )
    if any(outcome.state == "failed" for outcome in outcomes):
        raise typer.Exit(1)


@app.command("create")
def create_command(
    llm: Annotated[
        str, typer.Option(help="folder of a Qwen2 causal model; builtin:tiny, or a Covo-Audio without codes")
    ],
    encoder: Annotated[str, typer.Option(help="folder of a Whisper checkpoint or of a Covo-Audio; builtin:tiny")],
    output: Annotated[str, typer.Option(help="a new folder for the model")],
    codes: Annotated[int, typer.Option(help="codes of speech that it can write: the size of the codebook")] = 16384,
    adapter_downsample: Annotated[
        int, typer.Option(help="encoder frames of 20 ms that become one slot: 2, 4, 8, 16")
    ] = 8,
    adapter_hidden: Annotated[int, typer.Option(help="width inside the adapter")] = 2048,
    seed: Annotated[int, typer.Option(help="of the new rows and the adapter")] = 0,
    dtype: Annotated[str, typer.Option(help="auto (the LLM's), float32, bfloat16, float16")] = "auto",
) -> None:
    """Make a Covo-Audio of a text LLM and a speech encoder, for pre-training; compare it with both.

    Text rows and encoder are taken as they are. New tokens and codes start as the mean of the text rows plus
    N(0, 0.02), the adapter at random.
    """
    from covo_rl.supervised.pretrain.create import Creation, create_model

    with user_errors("covo-rl models create"):
        made = create_model(
            Creation(llm, encoder, output, codes, adapter_downsample, adapter_hidden, seed=seed, dtype=dtype)
        )
        first, count = made["first_code"], made["codes"]
        tokens = f"{made['text_tokens']:,} of the LLM, {made['added_tokens']} added"
        rows: Rows = [
            ("parameters", f"{made['parameters']:,} in {made['dtype']}"), ("tokens", tokens),
            ("codes", f"{count:,}, ids {first:,} to {first + count - 1:,}" if count else "none"),
            ("text logits", f"{made['logits_gap']:.1e} from the LLM's"),
            ("encoder", f"{made['encoder_gap']:.1e} from the source's"),
        ]  # fmt: skip
        console.print(summary_table(visible(output), rows))


def _list() -> None:
    from covo_rl.models.registry import family_types
    from covo_rl.run.published import published_of

    known = [(kind, ", ".join(published_of(kind)) or "-") for kind in family_types()]
    console.print(summary_table("families, by model_type of config.json; published models whose sizes we know", known))
    shipped = {path.parent.name: place for place, folder in reversed(folders("checkpoints"))
               for path in folder.glob("*/config.json")}  # fmt: skip
    names = dict.fromkeys([*builtin_names(), *sorted(shipped)])
    rows = [(f"{BUILTIN}{name}", shipped.get(name, "random weights, made on first use")) for name in names]
    console.print(summary_table("models of covo_rl's own", rows))
    console.print("covo-rl models show NAME says what one is, covo-rl models check PATH whether it is exact; another "
                  "family is one class: docs/models.md")  # fmt: skip


def _family(kind: str) -> Rows:
    from covo_rl.models import family_class
    from covo_rl.run.conformance.command import tiny_kind
    from covo_rl.run.published import published_of

    family = family_class(kind)
    limit, leaves, tiny = family.max_clip_seconds, family.lora_leaves, tiny_kind(kind)
    of = "" if tiny and family_class(tiny) is family else f", of {tiny}, which this one extends"
    return [
        ("class", f"{family.__module__}:{family.__name__}"),
        ("what", " ".join((inspect.getdoc(family) or "-").split("\n\n")[0].split())),
        ("clips", f"up to {limit:g} s" if limit else "of any length"),
        ("parts", ", ".join(f"{part} {prefix.rstrip('.')}" for part, prefix in family.parts.items())),
        ("LoRA adapts", ", ".join(leaves) if leaves else "every Linear inside the decoder's layers"),
        ("a group is", "one packed row" if family.packable else "a plain row for every completion, which is slower"),
        ("published", ", ".join(published_of(kind)) or "none whose sizes we know"),
        ("random weights", f"covo-rl models check {BUILTIN}tiny_{tiny}{of}" if tiny else "none"),
    ]  # fmt: skip


def _model(folder: str) -> tuple[Rows, list[str]]:
    from covo_rl.models import damage_named, family_class
    from covo_rl.run.sizes import shape_of, sizes_of

    with damage_named(folder):
        config = sizes_of(folder)
        family = family_class(config.model_type)
        shape, full = shape_of(config, AdapterConfig()), shape_of(config, AdapterConfig(lora=False))
    longest = family.max_clip_seconds
    rows: Rows = [
        ("family", f"{config.model_type} ({family.__module__})"),
        ("parameters", f"{shape.total:,}: "
                       + ", ".join(f"{part} {count:,}" for part, count in shape.parameters.items() if count)),
        ("decoder", f"{shape.layers} layers, {shape.width} wide, {shape.vocabulary:,} tokens"),
        ("clips", f"up to {longest:g} s" if longest else "of any length"),
        ("LoRA trains", f"{shape.trainable:,} at rank {AdapterConfig.lora_r}, {shape.trainable / shape.total:.2%}"),
        ("--full trains", f"{full.trainable:,}: {', '.join(AdapterConfig().train_parts)}"),
    ]  # fmt: skip
    if not Path(folder).is_dir():
        return [*rows, ("weights", "not on this disk: not looked at")], []
    weights, problems = _weights(Path(folder))
    wording = (Path(folder) / "prompt.yaml").is_file()
    rows += [*weights, ("wording", "its prompt.yaml" if wording else "none of its own: the options say it")]
    missing = [" or ".join(names) for names in TEXT_FILES if not any((Path(folder) / name).is_file() for name in names)]
    return rows, [*problems, *(f"{names} is missing" for names in missing)]


def _weights(folder: Path) -> tuple[Rows, list[str]]:
    """What lies in the safetensors files of a folder, and what is missing or cut."""
    files, problems = _weight_files(folder), []
    there = [path for path in files if path.is_file()]
    problems += [f"{path.name} is missing" for path in files if not path.is_file()]
    counts: Counter[str] = Counter()
    tensors = 0
    for path in there:
        try:
            for shape, dtype in _heads(path):
                size = 1
                for length in shape:
                    size *= length
                counts[dtype] += size
                tensors += 1
        except DamagedModel as error:
            problems.append(str(error))
    if not files:
        others = len(list(folder.glob("*.bin")))
        return ([("weights", f"{others} .bin files: not looked into")], []) if others else (
            [], ["it has no weights: no *.safetensors"])  # fmt: skip
    held = ", ".join(f"{count:,} in {dtype}" for dtype, count in counts.most_common())
    size = sum(path.stat().st_size for path in there) / 1e6
    return [("weights", f"{tensors} tensors, {held}; {len(there)} of {len(files)} files, {size:,.1f} MB")], problems


def _weight_files(folder: Path) -> list[Path]:
    """The files that the index names, or those that are there."""
    named = read_record(folder / "model.safetensors.index.json").get("weight_map")
    if isinstance(named, Mapping):
        return [folder / str(name) for name in sorted(set(map(str, named.values())))]
    return sorted(folder.glob("*.safetensors"))


def _heads(path: Path) -> Iterator[tuple[list[int], str]]:
    """Shape and dtype of every tensor.

    Raises:
        DamagedModel: the file is cut, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                part = file.get_slice(name)
                yield part.get_shape(), part.get_dtype()
    except (SafetensorError, OSError) as error:
        raise DamagedModel(f"{path.name} cannot be read ({visible(error)}): is the download complete?") from error


def _adapter(folder: Path) -> tuple[Rows, list[str]]:
    record = read_record(folder / "adapter_config.json")
    weights, problems = _weights(folder)
    base, wording = record.get("base_model_name_or_path"), (folder / "prompt.yaml").is_file()
    targets = record.get("target_modules")
    rows = [
        ("base model", base or "not recorded"),
        ("kind", f"{record.get('peft_type', '?')}, rank {record.get('r', '?')}, alpha {record.get('lora_alpha', '?')}"),
        ("on", ", ".join(sorted(map(str, targets))) if isinstance(targets, list) else targets or "?"),
        *weights,
        ("wording", "its prompt.yaml" if wording else "none of its own: the options say it"),
        ("use", f"covo-rl generate --model {base or 'BASE'} --adapter {folder} --audio CLIP --question TEXT"),
    ]
    return rows, problems


def _run(folder: Path) -> tuple[Rows, list[str]]:
    from covo_rl.records.follow import RunFollower

    run = RunFollower(folder)
    run.read()
    exported = [path for path in (folder / "adapter", folder / "model") if path.is_dir()]
    rows = [
        ("model", run.config.get("model", "?")),
        ("state", f"{run.status}, step {run.step} of {run.total or '?'}"),
        ("exported", ", ".join(map(str, exported)) or f"nothing yet: covo-rl export {folder} --adapter DIR"),
        ("see", f"covo-rl watch {folder}, covo-rl report {folder}"),
    ]
    return rows, run.notes
