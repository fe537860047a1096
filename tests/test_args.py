"""Options: of train.py (precedence, types, ranges, names, inheritance, configurations), and of any command."""
from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, replace

import pytest
from helpers import refused

import args
from args import Config, ExecutionConfig, parse
from models.config import ARCHITECTURES, DalleConfig
from utils.errors import UsageError, UserError
from utils.options import REQUIRED, Command, Options, again, as_arguments, choose, groups, option

SHIPPED = "L16 L16_POD16 L16_POD64 L16_CLIP_vocab M16 unit_test demo minDALLE_1.3B minDALLE_tiny".split()
SMALL = """
base: &base
  input_folder: demo
  batch_size: 3
  learning_rate: 1.0e-2
child:
  <<: *base
  batch_size: 5
"""


def write(folder, text, name="a"):
    """The flags that choose a configuration of a file with this text."""
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config-file", str(path), "--config", name]


def error_of(argv):
    message = refused("", parse, argv, kind=UsageError)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("words, name, batch_size", [
    ([], "base", 3), (["--batch-size", "7"], "base", 7), ([], "child", 5),
])
def test_default_then_yaml_with_what_it_inherits_then_flag(tmp_path, words, name, batch_size):
    config = parse([*write(tmp_path, SMALL, name), *words])
    assert (config.name, config.execution.batch_size, config.execution.epochs) == (name, batch_size, 1)
    assert config.optimizer.learning_rate == 0.01


def test_defaults_and_names():
    assert parse([]).name == "unit_test"
    assert [str(parse(["--config", "L16", *words]).log_dir) for words in ([], ["--log-dir", "x"])] == ["output", "x"]
    assert error_of(["--config", "nothing like it"]).endswith(", ".join(SHIPPED))  # which are all tested
    names = args.option_names()
    assert len(names) == len(set(names)) > 70 and not {"config", "config_file"} & set(names)
    assert args.COMMAND.specs["architecture"].settings["choices"] == tuple(ARCHITECTURES)
    for values in ARCHITECTURES.values():
        assert values.keys() <= {field.name for field in dataclasses.fields(DalleConfig)}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_fits_an_ipu_system(name):
    config = parse(["--config", name, "--generated-data"])
    ipu = config.ipu
    assert len(ipu.layers_per_ipu) == ipu.ipus_per_replica > ipu.embedding_ipu_id
    assert len(ipu.matmul_proportion) in (1, ipu.ipus_per_replica)
    # A pipeline of n stages needs at least 2n - 1 micro-batches.
    assert config.execution.gradient_accumulation >= 2 * ipu.ipus_per_replica - 1
    assert config.execution.native_precision("cpu") == ("bf16" if name == "minDALLE_1.3B" else "fp32")


@pytest.mark.parametrize("name, batch, accumulation, replicas, scaling", [
    ("L16", 2, 8192, 1, 32768), ("L16_POD16", 2, 2048, 4, 32768), ("L16_POD64", 2, 512, 16, 16384),
    ("L16_CLIP_vocab", 1, 15, 1, 16384)])
def test_published_numbers(name, batch, accumulation, replicas, scaling):
    config = parse(["--config", name])
    run, model, optimizer = config.execution, config.model, config.optimizer
    assert (run.batch_size, run.gradient_accumulation, run.replication_factor) == (batch, accumulation, replicas)
    assert config.global_batch == batch * accumulation * replicas and optimizer.loss_scaling == scaling
    assert (model.hidden_size, model.num_hidden_layers, model.num_attention_heads, model.dim_head) == (512, 16, 16, 64)
    row, column = "axial_row", "axial_col"
    assert model.attn_types == ((row, row, column, row) * 2 + (row, row, column, "full", row, row, column, "full"))
    assert config.checkpoints.checkpoint_save_steps == 5000
    assert config.data.truncate_captions and model.text_seq_len == 80 and model.loss_img_weight == 7
    clip = name == "L16_CLIP_vocab"
    assert (config.data.bpe_path is None) == clip and model.sandwich_norm == clip
    assert optimizer.learning_rate == (3e-4 if clip else 5e-3)
    assert optimizer.lr_scheduler == ("ReduceLROnPlateau" if clip else "multi_step")
    assert config.ipu.layers_per_ipu == ((0, 7, 7, 2) if clip else (0, 6, 6, 4))
    assert config.ipu.enable_rts == (replicas > 1)


@pytest.mark.parametrize("words, name, value", [
    ("--vqgan_model_path a --vqgan-config-path=b", "vqgan_model_path", "a"), ("--batch_size=2", "batch_size", 2),
    ("--wandb --wandb-run-name a_b", "wandb_run_name", "a_b"),
    ("--wandb false --wandb-run-name a_b", "wandb_run_name", "a_b"),
    ("--layers-per-ipu 0 6 6 4", "layers_per_ipu", [0, 6, 6, 4]),
    ("--layers-per-ipu 0,6,6 4", "layers_per_ipu", [0, 6, 6, 4]),
    ("--attn-types full,axial_row", "attn_types", ["full", "axial_row"]),
    ("--config L16 --bpe-path none", "bpe_path", None), ("--cls-ipu-id none", "cls_ipu_id", None),
    ("--plan", "plan", "show"), ("--plan auto", "plan", "auto"),
])
def test_spellings_of_flags_and_values(words, name, value):
    assert parse(words.split()).to_dict()[name] == value


def test_tuples_and_floats_in_yaml_and_boolean_flags(tmp_path):
    text = "a: {input_folder: demo, attn_types: 'full,conv_like', matmul_proportion: 0.2, layers_per_ipu: [1, 2]}"
    config = parse(write(tmp_path, text))
    assert config.model.attn_types == ("full", "conv_like")
    assert (config.ipu.matmul_proportion, config.ipu.layers_per_ipu) == ((0.2,), (1, 2))
    # A float may be written as YAML's text or as a whole number.
    optimizer = parse(write(tmp_path, "a: {input_folder: demo, learning_rate: 3e-4, loss_scaling: 8}")).optimizer
    assert (optimizer.learning_rate, optimizer.loss_scaling) == (3e-4, 8.0)
    assert isinstance(optimizer.loss_scaling, float)
    for words in ("--fp16", "--fp16 true", "--fp16 False", "--fp16=0", ""):
        assert parse(["--config", "L16", *words.split()]).execution.fp16 is ("False" not in words and "0" not in words)


#: (flags, what is said of them).
ERRORS = [
    ("--batch-size two", "--batch-size: expected a whole number, got 'two'"),
    ("--batch-size 1.5", "--batch-size: expected a whole number"),
    ("--batch-size none", "--batch-size: expected a whole number"),
    ("--batch-size 0", "--batch-size: must be at least 1, got 0"),
    ("--learning-rate abc", "--learning-rate: expected a number"),
    ("--learning-rate nan", "--learning-rate: expected a number"),
    ("--learning-rate 0", "--learning-rate: must be above 0"),
    ("--weight-decay -1", "--weight-decay: must be at least 0, got -1"),
    ("--validation-fraction 0.6", "--validation-fraction: must be at least 0 and at most 0.5, got 0.6"),
    ("--matmul-proportion 0.2 1.2", "--matmul-proportion: must be above 0 and at most 1, got 1.2"),
    ("--ema-decay 1", "--ema-decay: must be at least 0 and below 1"),
    ("--fp16 maybe", "--fp16: expected true or false, got 'maybe'"),
    ("--device gpu", "--device: expected one of auto, cpu, cuda, ipu, got 'gpu'."),
    ("--attn-types full,axial_rows", "got 'axial_rows'. Did you mean 'axial_row'?"),
    ("--attn-types full,", "--attn-types: expected one of full"),
    ("--optimizer adam", "expected one of Adam, AdamW, Muon, Adafactor, got 'adam'. Did you mean 'Adam'?"),
    ("--bpe-path a\0b", "--bpe-path: "), ("--input-folder=", "--input-folder"),
    ("--batch-size", "--batch-size: expected one argument"), ("--batch-size " + "9" * 5000, "--batch-size: "),
    ("--generated-data --input-folder demo", "--input-folder has no effect with --generated-data"),
    ("--synthetic-data --validation-fraction 0.1", "--validation-fraction has no effect with --synthetic-data"),
    ("--validation-folder x --validation-fraction 0.1", "--validation-fraction has no effect with --valid"),
    ("--warmup-steps 10", "--warmup-steps has no effect with --lr-scheduler ReduceLROnPlateau; it is"),
    ("--wandb-run-name x", "--wandb-run-name has no effect without --wandb"),
    ("--generated-data --evaluate-every 5", "--evaluate-every has no effect with --generated-data"),
    ("--code-noise-per-image", "--code-noise-per-image has no effect without --code-noise"),
    ("--augment-share 0.5", "--augment-share has no effect without --augment"),
    ("--input-folder x --evaluate-every 5 --evaluate-images 9", "--evaluate-images has no effect wi"),
    ("--evaluate-captions 5", "--evaluate-captions needs --evaluate-every"),
    ("--loss-scaling 3", "--loss-scaling: must be a power of two, got 3"),
    ("--bach-size 2", "unknown flag '--bach-size'. Did you mean '--batch-size'?"),
    ("--num_hiden_layers=2", "unknown flag '--num_hiden_layers'. Did you mean '--num-hidden-layers'?"),
    ("--batch 2", "unknown flag '--batch'."), ("-x", "unknown flag '-x'."), ("L16", "unexpected argument 'L16'"),
    ("--config L61", "no configuration 'L61'. Did you mean 'L16'?"),
    ("--config defaults", "no configuration 'defaults'"), ("--config .transformer", "no configuration '.transformer'"),
    ("--config-file nowhere.yaml", "--config-file nowhere.yaml cannot be read: No such file"),
    ("--config L16 --vqgan-model-path x", "--vqgan-model-path", "--vqgan-config-path"),
    ("--vae_path x", "--vae-path", "--vqgan-model-path"),
    ("--generated-data --synthetic-data", "--generated-data", "--synthetic-data"),
    ("--input-folder none", "--input-folder", "--generated-data"),
    ("--resume --pretrained-checkpoint x", "--resume", "--pretrained-checkpoint"),
    ("--device cpu --precision fp16", "--precision", "bf16"), ("--device ipu --precision bf16", "--precision", "fp16"),
    ("--config minDALLE_tiny --sandwich-norm", "--sandwich-norm", "--architecture mindalle"),
    ("--config minDALLE_tiny --attn-types full axial_row", "--attn-types", "--architecture mindalle"),
    ("--architecture image-gpt", "--architecture image-gpt", "--text-seq-len 1"),
    ("--shift-tokens --hidden-size 66", "--shift-tokens", "--hidden-size divisible by 4", "66"),
    ("--code-noise-similar 0.5 --cache-codes off", "--code-noise-similar", "--cache-codes off"),
    ("--code-noise-similar 0.5 --generated-data", "--code-noise-similar", "--generated-data"),
    ("--architecture image-gpt --text-seq-len 1 --activation swiglu", "--activation", "--architecture image-gpt"),
    ("--architecture image-gpt --text-seq-len 1 --layer-scale", "--layer-scale", "--architecture image-gpt"),
    ("--pretrained-checkpoint x --init-codes codebook", "--init-codes", "--pretrained-checkpoint"),
    ("--z-loss 2e9", "--z-loss", "at most 1e+06"),
    ("--rotary-2d --dim-head 6", "--rotary-2d", "--dim-head divisible by 4", "6"),
    ("--architecture image-gpt --text-seq-len 1 --device ipu", "--architecture image-gpt", "IPU"),
    ("--config minDALLE_tiny --dim-head 32", "--dim-head", "--num-attention-heads", "--hidden-size"),
]


@pytest.mark.parametrize("words, said", [(words, said) for words, *said in ERRORS])
def test_what_is_wrong_unknown_without_effect_or_contradicts_itself_is_named(words, said):
    message = error_of(words.split())
    assert [part for part in said if part not in message] == [] and len(message) < 300


@pytest.mark.parametrize("text, expected", [
    ("a: {bach_size: 1}", "my.yaml, configuration 'a': unknown key 'bach_size'. Did you mean 'batch_size'?"),
    ("a: {1: 1}", "unknown key '1'"),
    ("a: {batch_size: '3'}", "my.yaml, configuration 'a': batch_size: expected a whole number, got '3'"),
    ("a: {batch_size: true}", "batch_size: expected a whole number, got True"),
    ("a: {batch_size: 2.0}", "batch_size: expected a whole number"),
    ("a: {batch_size: null}", "batch_size: expected a whole number, got None"),
    ("a: {batch_size: [1]}", "batch_size: expected a whole number"),
    ("a: {batch_size: 0}", "batch_size: must be at least 1"), ("a: {fp16: 1}", "fp16: expected true or false, got 1"),
    ("a: {fp16: 'true'}", "fp16: expected true or false"),
    ("a: {learning_rate: fast}", "learning_rate: expected a number, got 'fast'"),
    ("a: {learning_rate: .inf}", "learning_rate: expected a number"),
    ("a: {wandb_run_name: 2020-01-01}", "wandb_run_name: expected text"),
    ("a: {layers_per_ipu: []}", "layers_per_ipu: needs at least one value"),
    ("a: {layers_per_ipu: [1, x]}", "layers_per_ipu: expected a whole number, got 'x'"),
    ("a: {layers_per_ipu: [1, [2]]}", "layers_per_ipu: expected a whole number, got [2]"),
    ("a: {epochs: 1, epochs: 2}", "key 'epochs' is given twice"),
    ("a: {epochs: 1}\na: {epochs: 2}", "line 2: key 'a' is given twice"),
    ("a: [1]", "configuration 'a' must be a mapping"), ("[1]", "must be a YAML mapping"),
    ("a: {epochs: 1", "line 1"), ("a: !!python/object/apply:os.system ['true']", "my.yaml"),
    ("a: {? [1] : 2}", "my.yaml"), ("\x00", "my.yaml"), ("[" * 1000, "my.yaml"),
])
def test_wrong_yaml(tmp_path, text, expected):
    assert expected in error_of(write(tmp_path, text))


def test_a_key_inherited_and_given_is_no_duplicate_and_the_first_of_several_sources_wins(tmp_path):
    # PyYAML copies merged keys into a node before it is built: those copies must not count as duplicates.
    text = SMALL + "grandchild: &g {<<: *base, epochs: 2}\nother: &other {epochs: 4}\n"
    for last, epochs in (
        ("<<: [*g, *base], epochs: 3", 3), ("<<: [*g, *other, *base]", 2), ("<<: [*base, *other, *g]", 4),
    ):  # as YAML defines it; PyYAML 6.0.4 takes the last source
        config = parse(write(tmp_path, text + f"last: {{{last}}}\n", "last"))
        assert (config.execution.epochs, config.execution.batch_size) == (epochs, 3)


def test_paths_are_looked_for_beside_the_configuration_file(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "configurations", tmp_path / "elsewhere"
    for path in (folder / "demo", elsewhere):
        path.mkdir(parents=True)
    (folder / "vocab.txt").write_text("x")
    monkeypatch.chdir(elsewhere)
    words = write(folder, "a: {input_folder: demo, bpe_path: vocab.txt, log_dir: logs}")
    config = parse(words)
    assert config.data.bpe_path == str(folder / "vocab.txt")
    assert config.data.input_folder == "demo"  # the built-in set, whatever lies around
    assert config.misc.log_dir == "logs"  # what is written goes to the working directory
    (elsewhere / "vocab.txt").write_text("y")
    assert parse(words).data.bpe_path == "vocab.txt"
    assert parse([*words, "--bpe-path", "absent.txt"]).data.bpe_path == "absent.txt"


def test_configurations_are_frozen_checked_and_survive_a_dict():
    config = parse(["--config", "demo", "--attn-types", "full,axial_row"])
    refused("", setattr, config.execution, "batch_size", 3, kind=dataclasses.FrozenInstanceError)
    refused("--batch-size: must be at least 1", dataclasses.replace, config.execution, batch_size=0, kind=UsageError)
    flat = config.to_dict()
    assert flat["config"] == "demo" and flat["attn_types"] == ["full", "axial_row"]
    assert Config.from_dict(flat) == config
    assert config.replace(hidden_size=8).model.hidden_size == 8 and config.model.hidden_size != 8
    refused("Did you mean 'hidden_size'", config.replace, hiden_size=8, kind=UsageError)
    text = parse(["--config", "L16_POD16"]).describe()
    assert "global batch 16384 = 2 (batch_size) x 2048 (gradient_accumulation) x 4 (replication_factor)" in text
    assert "enable_rts=true" in text and "dim_head" not in text and max(len(line) for line in text.splitlines()) <= 120
    half = ExecutionConfig(fp16=True)
    assert (half.native_precision("cpu"), half.native_precision("cuda")) == ("fp32", "fp16")
    assert ExecutionConfig().native_precision("cuda") == "fp32"
    assert ExecutionConfig(fp16=True, precision="bf16").native_precision("cpu") == "bf16"
    refused("--precision", ExecutionConfig(precision="fp16").native_precision, "cpu", kind=UsageError)


def test_help_has_the_groups_and_every_flag(capsys):
    assert refused("", parse, ["--help"], kind=SystemExit) == "0"
    text = capsys.readouterr().out
    positions = [text.index(f"\n{title}:\n") for title in
                 ("execution", "IPU", "optimizer", "model", "data", "checkpoints", "evaluation while training", "misc")]
    assert positions == sorted(positions)
    for name in args.option_names():
        assert re.search(rf"^  {args.flag_name(name)}\b", text, re.MULTILINE), name
    seed_flags = """
        config batch-size epochs device-iterations replication-factor gradient-accumulation stochastic-rounding
        embedding-serialization-factor enable-half-partials enable-rts optimizer-state-offchip ipus-per-replica
        layers-per-ipu cls-ipu-id embedding-ipu-id matmul-proportion async-dataloader random-seed fp16 optimizer
        learning-rate lr-scheduler loss-scaling enable-als weight-decay enable-half-first-order-momentum
        hidden-size text-seq-len num-hidden-layers num-attention-heads dim-head ff-dropout attn-dropout
        sandwich-norm loss-img-weight attn-types bpe-path truncate-captions byteio input-folder generated-data
        synthetic-data checkpoint-output-dir checkpoint-save-steps pretrained-checkpoint vae-path
        vqgan-model-path vqgan-config-path dataloader-workers wandb wandb-project-name wandb-run-name
        compile-only executable-cache-dir profile-dir
    """
    for flag in seed_flags.split():
        assert f"--{flag} " in text, flag


@dataclass(frozen=True)
class Shared(Options, title="shared"):
    seed: int = option(42, "of everything", ge=0)
    names: tuple[str, ...] = option((), "files", path=True)


@dataclass(frozen=True)
class Example(Shared, title="own"):
    source: str = option(REQUIRED, "what to read", positional=True, metavar="SOURCE")
    seed: int = again(Shared, "seed", default=7)
    size: float | None = option(None, "how large", gt=0, short="-s", none="all of it")
    half: bool = option(False, "half of it")
    part: str = option("all", "which part", choices=("all", "odd"), needs="half")


COMMAND = Command("example.py", "An example.", Example)


@pytest.mark.parametrize("words, expected", [
    ("a", {}), ("--half a", {"half": True}), ("a --half=false", {}), ("-s 2 a", {"size": 2.0}),
    ("a --size=none --seed 0", {"seed": 0}), ("a --names b,c ~d", {"names": ("b,c", "~d")}),
    ("--half a --part odd", {"half": True, "part": "odd"}),
])
def test_words(words, expected, monkeypatch):
    monkeypatch.setattr("os.path.expanduser", str)
    assert COMMAND.parse(words.split()) == Example(source="a", **expected)


@pytest.mark.parametrize("words, message", [
    ("", "missing SOURCE: what to read"), ("a b", "unexpected argument 'b'"),
    ("a --size 0", "--size: must be above 0, got 0"), ("a --part odd", "--part needs --half: half of it"),
    ("a --part ode", "--part: expected one of all, odd, got 'ode'. Did you mean 'odd'?"),
    ("a --sead 1", "unknown flag '--sead'. Did you mean '--seed'?"),
])
def test_errors(words, message):
    assert refused("", COMMAND.parse, words.split(), kind=UsageError).startswith(message)


def test_values_given_in_code_are_checked_too():
    example = Example(source="a")
    assert example.seed == 7 and example.given() == ["SOURCE"]
    for values in ({"seed": -1}, {"seed": True}, {"part": "odd"}, {"names": "\0"}):
        refused("", replace, example, kind=UsageError, **values)
    found = {title: [spec.name for spec in specs] for title, specs in groups(Example)}
    assert found == {"shared": ["seed", "names"], "own": ["source", "size", "half", "part"]}
    with pytest.raises(UserError, match="^path a--b: give bpe_path$"), as_arguments(dalle_path="path"):
        raise UserError("--dalle-path a--b: give --bpe-path")


def test_commands_of_a_program(capsys):
    commands = {"export": COMMAND, "verify": COMMAND}
    assert choose("x", commands, ["verify", "a", "--half"]) == ("verify", ["a", "--half"])
    for words in (["verif"], [], ["--half", "verify"]):
        refused("export or verify", choose, "x", commands, words, kind=UsageError)
    refused("", choose, "x", commands, ["--help"], kind=SystemExit)
    assert "export" in capsys.readouterr().out
