"""Options: precedence, types, ranges, names, inheritance and the shipped configurations."""
from __future__ import annotations

import dataclasses
import re

import pytest

import args
from args import Config, ExecutionConfig, parse
from models.config import ARCHITECTURES, DalleConfig
from utils.errors import UsageError

PUBLISHED = ["L16", "L16_POD16", "L16_POD64", "L16_CLIP_vocab"]
SHIPPED = [*PUBLISHED, "unit_test", "demo", "minDALLE_1.3B", "minDALLE_tiny"]
SMALL = """
base: &base
  input_folder: demo
  batch_size: 3
  learning_rate: 1.0e-2
child:
  <<: *base
  batch_size: 5
"""


def write(folder, text):
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(argv):
    with pytest.raises(UsageError) as caught:
        parse(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("words, name, batch_size", [
    (["base"], "base", 3), (["base", "--batch-size", "7"], "base", 7), (["child"], "child", 5)])
def test_default_then_yaml_with_what_it_inherits_then_flag(tmp_path, words, name, batch_size):
    config = parse(["--config-file", write(tmp_path, SMALL), "--config", *words])
    assert (config.name, config.execution.batch_size, config.execution.epochs) == (name, batch_size, 1)
    assert config.optimizer.learning_rate == 0.01


def test_defaults():
    assert parse([]).name == "unit_test"
    assert [str(parse(["--config", "L16", *words]).log_dir) for words in ([], ["--log-dir", "x"])] == ["output", "x"]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_fits_an_ipu_system(name):
    config = parse(["--config", name, "--generated-data"])
    ipu = config.ipu
    assert sum(ipu.layers_per_ipu) == config.model.num_hidden_layers
    assert len(ipu.layers_per_ipu) == ipu.ipus_per_replica
    assert ipu.embedding_ipu_id < ipu.ipus_per_replica
    assert len(ipu.matmul_proportion) in (1, ipu.ipus_per_replica)
    # A pipeline of n stages needs at least 2n - 1 micro-batches.
    assert config.execution.gradient_accumulation >= 2 * ipu.ipus_per_replica - 1
    assert config.execution.native_precision("cpu") == ("bf16" if name == "minDALLE_1.3B" else "fp32")


def test_shipped_names_are_all_tested():
    assert error_of(["--config", "nothing like it"]).endswith(", ".join(SHIPPED))


@pytest.mark.parametrize("name, batch, accumulation, replicas, scaling", [
    ("L16", 2, 8192, 1, 32768), ("L16_POD16", 2, 2048, 4, 32768), ("L16_POD64", 2, 512, 16, 16384),
    ("L16_CLIP_vocab", 1, 15, 1, 16384)])
def test_published_numbers(name, batch, accumulation, replicas, scaling):
    config = parse(["--config", name])
    run, model, optimizer = config.execution, config.model, config.optimizer
    assert (run.batch_size, run.gradient_accumulation, run.replication_factor) == (batch, accumulation, replicas)
    assert config.global_batch == batch * accumulation * replicas
    assert optimizer.loss_scaling == scaling
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
    ("--vqgan_model_path a --vqgan-config-path=b", "vqgan_model_path", "a"),
    ("--batch_size=2", "batch_size", 2),
    ("--wandb --wandb-run-name a_b", "wandb_run_name", "a_b"),
    ("--layers-per-ipu 0 6 6 4", "layers_per_ipu", [0, 6, 6, 4]),
    ("--layers-per-ipu 0,6,6 4", "layers_per_ipu", [0, 6, 6, 4]),
    ("--attn-types full,axial_row", "attn_types", ["full", "axial_row"]),
    ("--config L16 --bpe-path none", "bpe_path", None),
    ("--cls-ipu-id none", "cls_ipu_id", None),
    ("--plan", "plan", "show"),
    ("--plan auto", "plan", "auto"),
])
def test_spellings_of_flags_and_values(words, name, value):
    assert parse(words.split()).to_dict()[name] == value


@pytest.mark.parametrize("words, value", [(["--fp16"], True), (["--fp16", "true"], True), (["--fp16", "False"], False),
                                          (["--fp16=0"], False), ([], True)])
def test_boolean_flags_stand_alone_or_take_a_value(words, value):
    assert parse(["--config", "L16", *words]).execution.fp16 is value


def test_tuples_in_yaml(tmp_path):
    text = "a: {input_folder: demo, attn_types: 'full,conv_like', matmul_proportion: 0.2, layers_per_ipu: [1, 2]}"
    config = parse(["--config-file", write(tmp_path, text), "--config", "a"])
    assert config.model.attn_types == ("full", "conv_like")
    assert (config.ipu.matmul_proportion, config.ipu.layers_per_ipu) == ((0.2,), (1, 2))


def test_a_float_may_be_written_as_yaml_text_or_whole_number(tmp_path):
    config = parse(["--config-file", write(tmp_path, "a: {input_folder: demo, learning_rate: 3e-4, loss_scaling: 8}"),
                    "--config", "a"])
    assert config.optimizer.learning_rate == 3e-4
    assert config.optimizer.loss_scaling == 8.0 and isinstance(config.optimizer.loss_scaling, float)


@pytest.mark.parametrize("words, expected", [
    (["--batch-size", "two"], "--batch-size: expected a whole number, got 'two'"),
    (["--batch-size", "1.5"], "--batch-size: expected a whole number"),
    (["--batch-size", "none"], "--batch-size: expected a whole number"),
    (["--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
    (["--learning-rate", "abc"], "--learning-rate: expected a number"),
    (["--learning-rate", "nan"], "--learning-rate: expected a number"),
    (["--learning-rate", "0"], "--learning-rate: must be above 0"),
    (["--weight-decay", "-1"], "--weight-decay: must be at least 0, got -1"),
    (["--validation-fraction", "0.6"], "--validation-fraction: must be at least 0 and at most 0.5, got 0.6"),
    (["--matmul-proportion", "0.2", "1.2"], "--matmul-proportion: must be above 0 and at most 1, got 1.2"),
    (["--ema-decay", "1"], "--ema-decay: must be at least 0 and below 1"),
    (["--fp16", "maybe"], "--fp16: expected true or false, got 'maybe'"),
    (["--device", "gpu"], "--device: expected one of auto, cpu, cuda, ipu, got 'gpu'."),
    (["--attn-types", "full,axial_rows"], "got 'axial_rows'. Did you mean 'axial_row'?"),
    (["--attn-types", "full,"], "--attn-types: expected one of full"),
    (["--optimizer", "adam"], "expected one of Adam, AdamW, Muon, Adafactor, got 'adam'. Did you mean 'Adam'?"),
    (["--bpe-path", "a\0b"], "--bpe-path: "),
    (["--input-folder", ""], "--input-folder"),
    (["--batch-size"], "--batch-size: expected one argument"),
    (["--batch-size", "9" * 5000], "--batch-size: "),
])
def test_wrong_values_of_flags(words, expected):
    message = error_of(words)
    assert expected in message and len(message) < 300


@pytest.mark.parametrize("words, expected", [
    (["--generated-data", "--input-folder", "demo"], "--input-folder has no effect with --generated-data"),
    (["--synthetic-data", "--validation-fraction", "0.1"], "--validation-fraction has no effect with --synthetic-data"),
    (["--validation-folder", "x", "--validation-fraction", "0.1"], "--validation-fraction has no effect with --valid"),
    (["--warmup-steps", "10"], "--warmup-steps has no effect with --lr-scheduler ReduceLROnPlateau; it is"),
    (["--wandb-run-name", "x"], "--wandb-run-name has no effect without --wandb"),
    (["--loss-scaling", "3"], "--loss-scaling: must be a power of two, got 3"),
    (["--bach-size", "2"], "unknown flag '--bach-size'. Did you mean '--batch-size'?"),
    (["--num_hiden_layers=2"], "unknown flag '--num_hiden_layers'. Did you mean '--num-hidden-layers'?"),
    (["--batch", "2"], "unknown flag '--batch'."),  # no abbreviations
    (["-x"], "unknown flag '-x'."),
    (["L16"], "unexpected argument 'L16'"),
    (["--config", "L61"], "no configuration 'L61'. Did you mean 'L16'?"),
    (["--config", "defaults"], "no configuration 'defaults'"),
    (["--config", ".transformer"], "no configuration '.transformer'"),
    (["--config-file", "nowhere.yaml"], "--config-file nowhere.yaml cannot be read: No such file"),
])
def test_unknown_and_ignored_flags(words, expected):
    assert expected in error_of(words)


@pytest.mark.parametrize("text, expected", [
    ("a: {bach_size: 1}", "my.yaml, configuration 'a': unknown key 'bach_size'. Did you mean 'batch_size'?"),
    ("a: {1: 1}", "unknown key '1'"),
    ("a: {batch_size: '3'}", "my.yaml, configuration 'a': batch_size: expected a whole number, got '3'"),
    ("a: {batch_size: true}", "batch_size: expected a whole number, got True"),
    ("a: {batch_size: 2.0}", "batch_size: expected a whole number"),
    ("a: {batch_size: null}", "batch_size: expected a whole number, got None"),
    ("a: {batch_size: [1]}", "batch_size: expected a whole number"),
    ("a: {batch_size: 0}", "batch_size: must be at least 1"),
    ("a: {fp16: 1}", "fp16: expected true or false, got 1"),
    ("a: {fp16: 'true'}", "fp16: expected true or false"),
    ("a: {learning_rate: fast}", "learning_rate: expected a number, got 'fast'"),
    ("a: {learning_rate: .inf}", "learning_rate: expected a number"),
    ("a: {wandb_run_name: 2020-01-01}", "wandb_run_name: expected text"),
    ("a: {layers_per_ipu: []}", "layers_per_ipu: needs at least one value"),
    ("a: {layers_per_ipu: [1, x]}", "layers_per_ipu: expected a whole number, got 'x'"),
    ("a: {layers_per_ipu: [1, [2]]}", "layers_per_ipu: expected a whole number, got [2]"),
    ("a: {epochs: 1, epochs: 2}", "key 'epochs' is given twice"),
    ("a: {epochs: 1}\na: {epochs: 2}", "line 2: key 'a' is given twice"),
    ("a: [1]", "configuration 'a' must be a mapping"),
    ("[1]", "must be a YAML mapping"),
    ("a: {epochs: 1", "line 1"),
    ("a: !!python/object/apply:os.system ['true']", "my.yaml"),
    ("a: {? [1] : 2}", "my.yaml"),
    ("\x00", "my.yaml"),
    ("[" * 1000, "my.yaml"),
])
def test_wrong_yaml(tmp_path, text, expected):
    assert expected in error_of(["--config-file", write(tmp_path, text), "--config", "a"])


def test_a_key_inherited_and_given_is_no_duplicate(tmp_path):
    # PyYAML copies merged keys into a node before it is built: those copies must not count as duplicates.
    text = SMALL + "grandchild: &g {<<: *base, epochs: 2}\nlast: {<<: [*g, *base], epochs: 3}\n"
    config = parse(["--config-file", write(tmp_path, text), "--config", "last"])
    assert (config.execution.epochs, config.execution.batch_size) == (3, 3)


@pytest.mark.parametrize("order, epochs", [("*g, *other, *base", 2), ("*base, *other, *g", 4)])
def test_the_first_of_several_sources_wins(tmp_path, order, epochs):
    # As YAML defines it. PyYAML 6.0.4 takes the last.
    text = SMALL + f"g: &g {{epochs: 2}}\nother: &other {{epochs: 4}}\nlast: {{<<: [{order}]}}\n"
    config = parse(["--config-file", write(tmp_path, text), "--config", "last"])
    assert (config.execution.epochs, config.execution.batch_size) == (epochs, 3)


@pytest.mark.parametrize("words, names", [
    (["--config", "L16", "--vqgan-model-path", "x"], ["--vqgan-model-path", "--vqgan-config-path"]),
    (["--vae_path", "x"], ["--vae-path", "--vqgan-model-path"]),
    (["--generated-data", "--synthetic-data"], ["--generated-data", "--synthetic-data"]),
    (["--input-folder", "none"], ["--input-folder", "--generated-data"]),
    (["--resume", "--pretrained-checkpoint", "x"], ["--resume", "--pretrained-checkpoint"]),
    (["--device", "cpu", "--precision", "fp16"], ["--precision", "bf16"]),
    (["--device", "ipu", "--precision", "bf16"], ["--precision", "fp16"]),
    (["--config", "minDALLE_tiny", "--sandwich-norm"], ["--sandwich-norm", "--architecture mindalle"]),
    (["--config", "minDALLE_tiny", "--attn-types", "full", "axial_row"], ["--attn-types", "--architecture mindalle"]),
    (["--architecture", "image-gpt"], ["--architecture image-gpt", "--text-seq-len 1"]),
    (["--architecture", "image-gpt", "--text-seq-len", "1", "--device", "ipu"], ["--architecture image-gpt", "IPU"]),
    (["--config", "minDALLE_tiny", "--dim-head", "32"], ["--dim-head", "--num-attention-heads", "--hidden-size"]),
])
def test_contradictions_name_the_flags(words, names):
    message = error_of(words)
    assert all(name in message for name in names)


def test_every_architecture_can_be_chosen():
    assert args.COMMAND.specs["architecture"].settings["choices"] == tuple(ARCHITECTURES)
    for values in ARCHITECTURES.values():
        assert values.keys() <= {field.name for field in dataclasses.fields(DalleConfig)}


def test_precision_of_the_native_engine():
    half = ExecutionConfig(fp16=True)
    assert (half.native_precision("cpu"), half.native_precision("cuda")) == ("fp32", "fp16")
    assert ExecutionConfig().native_precision("cuda") == "fp32"
    assert ExecutionConfig(fp16=True, precision="bf16").native_precision("cpu") == "bf16"
    with pytest.raises(UsageError, match="--precision"):
        ExecutionConfig(precision="fp16").native_precision("cpu")


def test_paths_are_looked_for_beside_the_configuration_file(tmp_path, monkeypatch):
    folder = tmp_path / "configurations"
    elsewhere = tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "vocab.txt").write_text("x")
    (folder / "demo").mkdir()
    monkeypatch.chdir(elsewhere)
    file = write(folder, "a: {input_folder: demo, bpe_path: vocab.txt, log_dir: logs}")
    words = ["--config-file", file, "--config", "a"]
    config = parse(words)
    assert config.data.bpe_path == str(folder / "vocab.txt")
    assert config.data.input_folder == "demo"  # the built-in set, whatever lies around
    assert config.misc.log_dir == "logs"  # what is written goes to the working directory
    (elsewhere / "vocab.txt").write_text("y")
    assert parse(words).data.bpe_path == "vocab.txt"
    assert parse([*words, "--bpe-path", "absent.txt"]).data.bpe_path == "absent.txt"


def test_configurations_are_frozen_checked_and_survive_a_dict():
    config = parse(["--config", "demo", "--attn-types", "full,axial_row"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.execution.batch_size = 3
    with pytest.raises(UsageError, match="--batch-size: must be at least 1"):
        dataclasses.replace(config.execution, batch_size=0)
    flat = config.to_dict()
    assert flat["config"] == "demo" and flat["attn_types"] == ["full", "axial_row"]
    assert Config.from_dict(flat) == config
    assert config.replace(hidden_size=8).model.hidden_size == 8 and config.model.hidden_size != 8
    with pytest.raises(UsageError, match="Did you mean 'hidden_size'"):
        config.replace(hiden_size=8)


def test_option_names_are_unique():
    names = args.option_names()
    assert len(names) == len(set(names)) > 70
    assert not {"config", "config_file"} & set(names)


def test_describe_names_the_global_batch_and_what_was_changed():
    text = parse(["--config", "L16_POD16"]).describe()
    assert "global batch 16384 = 2 (batch_size) x 2048 (gradient_accumulation) x 4 (replication_factor)" in text
    assert "enable_rts=true" in text and "dim_head" not in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_help_has_the_groups_and_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    positions = [text.index(f"\n{title}:\n") for title in
                 ("execution", "IPU", "optimizer", "model", "data", "checkpoints", "misc")]
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
