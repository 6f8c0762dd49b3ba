"""Names, shapes and FP8 scales add up to the released checkpoints: their published tensor counts and sizes."""

import math

from checkpoints_convert import fp8
from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from tests.support.tiny_models import checkpoint_shapes

_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def stored(name: str, backbone_layer: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (dtype, shape) of an FP8 release whose prediction layer has the tensors of `backbone_layer`, and its own."""
    fields = preset(name)
    config = Config.from_hf(fields)
    shapes = checkpoint_shapes(config, Schedule.from_hf(fields))
    hidden, prediction = config.hidden_size, f"model.layers.{config.num_layers}."
    like = checkpoint_shapes(config, Schedule.all_full(config.num_layers))
    backbone = f"model.layers.{backbone_layer}."
    shapes |= {key.replace(backbone, prediction): shape for key, shape in like.items() if key.startswith(backbone)}
    shapes |= {f"{prediction}{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "shared_head.norm")}
    shapes |= {f"{prediction}eh_proj.weight": (hidden, 2 * hidden)}
    if name == "deepseek-v3.2":
        shapes |= {f"{prediction}{copy}.weight": (config.vocab_size, hidden) for copy in ("embed_tokens", "shared_head.head")}
    not_quantised = ("embed_tokens", "head", "mlp.gate.weight", "weights_proj", "eh_proj")
    tensors = {}
    for key, shape in shapes.items():
        if len(shape) == 1:
            tensors[key] = ("F32" if key.endswith("e_score_correction_bias") else "BF16", shape)
        elif any(part in key for part in not_quantised):
            tensors[key] = ("BF16", shape)
        else:
            tensors[key] = ("F8_E4M3", shape)
            tensors[key + fp8.SUFFIX] = ("F32", fp8.scale_shape(shape, fp8.DEFAULT_BLOCK))
    return tensors


def test_glm_5_2():
    tensors = stored("glm-5.2", 77)
    assert len(tensors) == 118_629
    assert sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in tensors.values()) == 755_617_140_416
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == ("F32", (5, 48))


def test_deepseek_v3_2():
    tensors = stored("deepseek-v3.2", 60)
    assert len(tensors) == 92_425
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == ("F32", (5, 56))
    assert tensors["model.layers.60.self_attn.indexer.wq_b.weight_scale_inv"] == ("F32", (64, 12))
