"""The placement plan: pure arithmetic, checked against hand-made cases, the published divisions and a count by hand."""
from __future__ import annotations

import itertools

import pytest
import torch
from helpers import tiny_vqgan
from ipu_helpers import published_model, small_model
from PIL import Image

import args
from engines.ipu import plan, plan_costs, plan_report
from engines.ipu.plan import Placement
from models.dalle import DalleModel, TextToImage
from models.vqgan import VqganConfig
from utils.errors import UsageError

SMALL_VQGAN = tiny_vqgan(resolution=32, ch_mult=(1, 2), num_codes=11, embed_dim=4, z_channels=4)


def config_of(**options):
    base = {"num_hidden_layers": 3, "layers_per_ipu": [3], "device": "ipu", "gradient_accumulation": 16}
    return args.Config().replace(**{**base, "image_size": 8, "cache_codes": "off", **options})  # the VQGAN on IPU 0


def test_parts_lie_where_the_flags_say():
    def ipus_of(config, encodes_images=True):
        placements = plan.pipeline_plan(config, encodes_images)
        return [(placement.path.replace("dalle.transformer.", ""), placement.ipu) for placement in placements]

    config = config_of(ipus_per_replica=4, layers_per_ipu=[0, 2, 1, 0])
    names = ["vqgan", *(f"dalle.{name}_emb" for name in ("text", "image", "text_pos", "image_pos"))]
    names += ["layers.0", "layers.1", "layers.2", "dalle.norm", "dalle.text_head", "dalle.image_head"]
    assert ipus_of(config) == list(zip(names, [0] * 5 + [1, 1, 2] + [3] * 3))
    assert ipus_of(config, encodes_images=False)[0] == ("dalle.text_emb", 0)
    moved = dict(ipus_of(config.replace(embedding_ipu_id=1, cls_ipu_id=2)))
    assert (moved["vqgan"], moved["dalle.image_emb"], moved["layers.2"], moved["dalle.norm"]) == (0, 1, 2, 2)
    paths = {placement.path for placement in plan.pipeline_plan(config)}
    for name, _ in DalleModel(small_model()).named_parameters():
        assert any(("dalle." + name).startswith(path + ".") for path in paths), name


@pytest.mark.parametrize("ipus, starts, stages", [
    ([0, 0, 0], [], 1), ([0, 1, 1, 2], [1, 3], 3),
    ([1, 1, 2], [0, 2], 3),  # what runs before the first block is on IPU 0: a stage of its own
    ([0, 1, 0], [1, 2], 3),  # a return is a stage
])
def test_a_block_begins_where_the_ipu_changes(ipus, starts, stages):
    placements = [Placement(f"part{index}", ipu) for index, ipu in enumerate(ipus)]
    assert plan.block_starts(placements) == [placements[index] for index in starts]
    assert plan.num_stages(placements) == stages and plan.stage_of(placements)[-1] == stages - 1
    assert plan.bubble(1, 1) == 0 and plan.min_accumulation(4) == 7
    assert plan.bubble(4, 7) == pytest.approx(6 / 13)  # 7 useful cycles, 3 to fill forward and 3 to drain backward


def test_the_published_divisions_come_out():
    """L16 and L16_CLIP_vocab were divided by hand as [0, 6, 6, 4] and [0, 7, 7, 2]."""
    for name, vocabulary, published in (("L16", 8192, (0, 6, 6, 4)), ("L16_CLIP_vocab", 49408, (0, 7, 7, 2))):
        config = args.parse(["--config", name, "--cache-codes", "off"])
        parts = plan_report.measured(config, published_model(config, vocabulary), VqganConfig())
        assert not plan.problems(config, published_model(config, vocabulary))
        ours = config.replace(layers_per_ipu=list(plan_costs.divide(config, parts)))
        given, best = (plan_costs.ipu_costs(each, plan_costs.moved(parts, each)) for each in (config, ours))
        assert max(ipu.flops for ipu in best) == max(ipu.flops for ipu in given)
        assert max(ipu.memory for ipu in best) <= max(ipu.memory for ipu in given) < plan_costs.IPU_MEMORY
        assert abs(ours.ipu.layers_per_ipu[1] - published[1]) <= 1 and ours.ipu.layers_per_ipu[0] == 0


def costs_of(config, model):
    parts = plan_report.measured(config, model, SMALL_VQGAN)
    return {part.placement.path: part for part in parts}, plan_costs.ipu_costs(config, parts)


def test_arithmetic_and_activations_of_a_layer_by_hand():
    model = small_model()
    parts, _ = costs_of(config_of(ipus_per_replica=2, layers_per_ipu=[1, 2]), model)
    length, dim, inner, heads, hidden = model.seq_len, 16, 16, 2, 64
    products = 3 * dim * inner + inner * dim + dim * 2 * hidden + hidden * dim
    layer = parts["dalle.transformer.layers.1"]
    assert layer.flops == 2 * length * products + 2 * 2 * heads * length * length * 8
    assert layer.stored_bytes == 4 * length * dim
    assert layer.written_bytes > 4 * (3 * heads * length * length + length * 2 * hidden)  # scores, mask, softmax; GEGLU
    assert parts["dalle.text_head"].flops == 2 * 6 * dim * 36
    convolution = 2 * 3 * 9 * 8 * 8 * 8  # the VQGAN's first: 3 -> 8 channels of 3x3 at 8x8 pixels
    assert parts["vqgan"].flops > convolution and parts["vqgan"].trainable == 0


def test_memory_adds_up():
    model = small_model()
    config = config_of(ipus_per_replica=2, layers_per_ipu=[1, 2], batch_size=4)
    parts, ipus = costs_of(config, model)
    trained = sum(p.numel() for p in DalleModel(model).parameters())
    assert sum(ipu.gradients for ipu in ipus) == 4 * trained
    assert sum(part.trainable for part in parts.values()) == trained
    layer = parts["dalle.transformer.layers.1"].stored_bytes
    assert ipus[0].stored == 4 * 3 * layer  # 2 stages: three micro-batches are on their way at the first
    assert ipus[1].stored == 4 * 1 * (2 * layer + layer)  # its two layers, and what came in
    for options, bytes_of_state in (
        ({}, 8), ({"fp16": True, "enable_half_first_order_momentum": True}, 6),
        ({"enable_rts": True, "replication_factor": 4}, 2), ({"optimizer_state_offchip": True}, 0),
    ):
        _, others = costs_of(config.replace(**options), model)
        assert sum(ipu.optimizer for ipu in others) == bytes_of_state * trained
        assert (1 + ("fp16" in options)) * sum(ipu.weights for ipu in others) == sum(ipu.weights for ipu in ipus)
    shared = small_model(shared_attn_ids=(0,), tie_embeddings=True)  # what is shared counts once
    parts, _ = costs_of(config_of(), shared)
    assert sum(part.trainable for part in parts.values()) == sum(p.numel() for p in DalleModel(shared).parameters())


def test_the_best_division_is_the_best_of_all():
    config = config_of(num_hidden_layers=5, ipus_per_replica=4, layers_per_ipu=[5, 0, 0, 0])
    parts = plan_report.measured(config, small_model(depth=5), SMALL_VQGAN)
    best = config.replace(layers_per_ipu=list(plan_costs.divide(config, parts)))

    def busiest(division):
        return max(ipu.flops for ipu in plan_costs.ipu_costs(division, plan_costs.moved(parts, division)))

    counts = [each for each in itertools.product(range(6), repeat=4) if sum(each) == 5 and max(each) < 5]
    every = [config.replace(layers_per_ipu=list(each)) for each in counts]
    assert len(every) == 52 and busiest(best) == min(map(busiest, every))


def test_divisions_that_do_not_fit_are_not_proposed(monkeypatch):
    config = config_of(num_hidden_layers=4, ipus_per_replica=2, layers_per_ipu=[0, 4])
    parts = plan_report.measured(config, small_model(depth=4), SMALL_VQGAN)
    monkeypatch.setattr(plan_costs, "IPU_MEMORY", plan_costs.ipu_costs(config, parts)[1].memory * 0.7)
    assert max(plan_costs.divide(config, parts)) < 4
    monkeypatch.setattr(plan_costs, "IPU_MEMORY", 1)
    assert sum(plan_costs.divide(config, parts)) == 4  # nothing fits: the least bad one


def test_measuring_changes_nothing():
    with torch.device("meta"):
        model = TextToImage(DalleModel(small_model()))
    placements = plan.pipeline_plan(config_of(), encodes_images=False)
    assert plan_costs.measure(model, placements, 8) == plan_costs.measure(model, placements, 8)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


FOUR = {"ipus_per_replica": 4, "layers_per_ipu": [0, 1, 1, 1]}


@pytest.mark.parametrize("options, message", [
    ({"layers_per_ipu": [1, 2]}, "--layers-per-ipu .* one for each IPU"),
    ({"layers_per_ipu": [2]}, "--layers-per-ipu .*--plan auto"),
    ({"ipus_per_replica": 3, "layers_per_ipu": [1, 1, 1]}, "--ipus-per-replica .*powers of two"),
    ({"cls_ipu_id": 1}, "--cls-ipu-id .*IPUs 0 to 0"), ({"embedding_ipu_id": 2}, "--embedding-ipu-id .*IPUs 0 to 0"),
    ({"matmul_proportion": [0.1, 0.2]}, "--matmul-proportion.*one for all"),
    ({**FOUR, "gradient_accumulation": 6}, "--gradient-accumulation .*at least 7"),
    ({"embedding_serialization_factor": 5}, "--embedding-serialization-factor .*4 does"),
    ({"replication_factor": 3}, "--replication-factor .*powers of two"),
    ({"enable_rts": True}, "--enable-rts .*omit it"),
    ({"gradient_accumulation": 1}, "--async-dataloader .*--async-dataloader false"),
    ({"enable_als": True}, "--enable-als .*--fp16"), ({"ema_decay": 0.9}, "--ema-decay .*--ema-decay 0"),
    ({"attention_impl": "sdpa"}, "--attention-impl .*auto"), ({"compile": True}, "--compile .*omit it"),
    ({"matmul_precision": "high"}, "--matmul-precision .*omit it"), ({"optimizer": "Muon"}, "--optimizer .*AdamW"),
    ({"soft_codes": 0.5, "soft_codes_fade": 0.2}, "--soft-codes-fade 0.2.*--soft-codes-fade 0$"),
    ({"code_noise_similar": 0.5}, "--code-noise-similar 0.5.*--code-noise-similar 0$"),
    ({}, None), ({**FOUR, "gradient_accumulation": 7}, None), ({"replication_factor": 4, "enable_rts": True}, None),
    ({"enable_als": True, "fp16": True}, None), ({"embedding_serialization_factor": 6}, None),
    ({"gradient_accumulation": 1, "async_dataloader": False}, None),
])
def test_what_cannot_work_is_told_with_its_flag_and_a_way_out(options, message):
    if message is None:
        assert plan.problems(config_of(**options), small_model()) == []
    else:
        with pytest.raises(UsageError, match=message) as caught:
            plan.check(config_of(**options), small_model())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options, way_out", [
    ({}, None), ({"tie_embeddings": True}, "--cls-ipu-id 0"), ({"shared_attn_ids": (0,)}, "IPU 0"),
    ({"shared_ff_ids": (0, 1)}, "IPU 0"),
])
def test_shared_weights_must_lie_on_one_ipu(options, way_out):
    found = plan.problems(config_of(ipus_per_replica=2, layers_per_ipu=[2, 1]), small_model(**options))
    assert len(found) == bool(way_out) and all(way_out in problem for problem in found)


def report(**options):
    config = config_of(ipus_per_replica=2, **options)
    found = plan_report.divisions(config, small_model(), SMALL_VQGAN)
    return plan_report.describe(config, small_model(), found), found


def test_the_table_says_what_lies_where_and_what_does_not_work(monkeypatch):
    text, found = report(layers_per_ipu=[1, 2], plan="show")
    assert len(found) == 1
    rows = [line.split() for line in text.splitlines() if line.strip()[:1] in ("0", "1")]
    assert rows[0][:6] == ["0", "0", "vqgan", "text_emb", "image_emb", "layer"]
    assert " ".join(rows[1]).startswith("1 1 layers 1-2 norm text_head image_head")
    assert rows[0][-1].endswith("%") and int(rows[0][-1][:-1]) + int(rows[1][-1][:-1]) in (99, 100, 101)
    assert "2 stages, 16 micro-batches" in text and "problem" not in text
    text, _ = report(layers_per_ipu=[1, 2], plan="show", gradient_accumulation=2)
    assert "problem: --gradient-accumulation 2" in text
    for module in (plan_costs, plan_report):
        monkeypatch.setattr(module, "IPU_MEMORY", 1000)
    assert "DOES NOT FIT" in report(layers_per_ipu=[1, 2], plan="show")[0]


def test_the_proposal_comes_beside_the_given_division_or_alone_and_is_drawn(tmp_path):
    text, found = report(layers_per_ipu=[3, 0], plan="auto")
    assert next(division.config.ipu.layers_per_ipu[0] for division in found) == 3 and len(found) == 2
    assert plan_costs.balance(found[1].ipus) >= plan_costs.balance(found[0].ipus)
    plan_report.draw(found, tmp_path / "made" / "plan.png")
    with Image.open(tmp_path / "made" / "plan.png") as image:
        assert image.width > 600 and image.height > 600 and len(image.convert("RGB").getcolors(1 << 24)) > 50
    text, found = report(layers_per_ipu=list(found[1].config.ipu.layers_per_ipu), plan="auto")
    assert len(found) == 1 and "as configured, the best division" in text
    text, found = report(layers_per_ipu=[3], plan="auto")
    assert len(found) == 1 and sum(found[0].config.ipu.layers_per_ipu) == 3 and "problem" not in text
    text, found = report(layers_per_ipu=[3], plan="show")
    assert not found and "problem: --layers-per-ipu 3" in text


def test_images_that_are_encoded_ahead_need_no_vqgan_on_the_ipus():
    layout = {"layers_per_ipu": [0, 3], "plan": "auto"}
    text, found = report(**layout)
    assert "vqgan text_emb" in text and "by the VQGAN on IPU 0" in text
    ahead, others = report(cache_codes="auto", **layout)
    assert " vqgan " not in ahead and "no VQGAN on the IPUs" in ahead
    assert others[0].ipus[0].flops == 0 < found[0].ipus[0].flops
    assert others[1].ipus[0].layers >= 1  # the room it leaves is for layers
    text, _ = report(cache_codes="auto", generated_data=True, **layout)
    assert "vqgan text_emb" in text  # random images are encoded in each step
