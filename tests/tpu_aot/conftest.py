"""Programs for TPUs that are not at hand are compiled as users compile them, and not kept: JAX could not load them."""

from collections.abc import Iterator

import jax
import pytest

AS_USERS = {"jax_disable_most_optimizations": False, "jax_persistent_cache_min_compile_time_secs": 1e9}


def configure(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def compiled_as_users_do(quick_to_compile: None) -> Iterator[None]:
    before = {name: jax.config.values[name] for name in AS_USERS}
    configure(AS_USERS)
    yield
    configure(before)
