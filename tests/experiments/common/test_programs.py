"""Where compiled programs are kept."""

import jax
import pytest

from experiments.common import programs


@pytest.fixture
def settings():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache_unless_jax_was_told_where(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    programs.keep()
    assert jax.config.jax_compilation_cache_dir == str(programs.folder()) and str(tmp_path) in str(programs.folder())
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    programs.keep()
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    programs.keep()
    assert jax.config.jax_compilation_cache_dir is None
