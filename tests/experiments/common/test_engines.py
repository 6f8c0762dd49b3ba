"""What is pasted into an engine."""

import json
import shlex

import checkpoints_convert
from experiments.common import engines, options
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from tests.support.tiny_models import DEEPSEEK_FIELDS, GLM_FIELDS


def test_settings_are_what_each_engine_reads():
    config = Config.from_hf(GLM_FIELDS)
    found = {s.engine: s.usage for s in engines.settings(Schedule("FFSFS"), "my dir/glm", config)}
    for engine, flag in (("sglang", "--json-model-override-args"), ("vllm", "--hf-overrides")):
        words = shlex.split(found[engine])
        assert "my dir/glm" in words
        assert json.loads(words[words.index(flag) + 1])["index_topk_pattern"] == "FFSFS"
    assert "indexer_types" in found["transformers"] and '"index_topk_pattern": "FFSFS"' in found["tensorrt-llm"]
    deepseek = {s.engine: s.usage for s in engines.settings(Schedule("FFSFS"), "x/", Config.from_hf(DEEPSEEK_FIELDS))}
    assert deepseek["transformers"].startswith("not supported")
    assert deepseek["tensorrt-llm"].startswith("in x/config.json: ")


def test_engines_are_given_safetensors(tmp_path):
    config, schedule, params = checkpoints_convert.load(options.DEMO)
    checkpoints_convert.save(tmp_path / "a b", params, config, schedule, format="orbax")
    directory, command = engines.for_engines(f"{tmp_path}/a b/")
    assert command == f"python -m checkpoints_convert '{tmp_path}/a b/' '{directory}' --format=safetensors"
    assert directory == f"{tmp_path}/a b-safetensors" and engines.for_engines(str(options.DEMO)) == (str(options.DEMO), "")


def test_a_deepseek_export_warns_of_transformers():
    assert any("random weights" in line for line in engines.caveats(Config.from_hf(DEEPSEEK_FIELDS)))
    assert not any("random weights" in line for line in engines.caveats(Config.from_hf(GLM_FIELDS)))
