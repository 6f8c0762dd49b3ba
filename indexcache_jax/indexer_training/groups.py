"""Groups trained as the layers pass by: side by side on several devices, or one after the other.

A group's result depends on the seed, its F layer and the text alone, not on which groups were trained before. So groups train
side by side, on as many devices as there are, and devices exchange nothing for it: a thread for each takes a group's hidden
states, attention weights and indexer. Between the steps of its group a device takes sequences through the next layers.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import tensors
from indexcache_jax.indexer_training import step
from indexcache_jax.indexer_training.cost import last_layer, pass_work, step_work, unfinished
from indexcache_jax.indexer_training.hidden_states import advanced, embedded, held
from indexcache_jax.indexer_training.rows import rows_on_device, states_of
from indexcache_jax.indexer_training.run import Run, Trained
from indexcache_jax.indexer_training.share import Share
from indexcache_jax.indexer_training.targets import kept_targets, recomputed_targets
from indexcache_jax.layers import in_order, shardings_in_force
from indexcache_jax.model import AttentionLayer
from indexcache_jax.params import Indexer, at_layer

Job = Callable[[jax.Device | None], Trained]  # trains a group on a device
Progress = Callable[[float, str], object]


def no_progress(work: float, what: str) -> None:
    """Progress that nobody follows."""


@dataclasses.dataclass
class Gathered:
    """What a group is trained from: its indexer, and by layer its attention weights and the hidden states before it.

    Weights are stacks of one layer.
    """

    indexer: Indexer
    layers: list[AttentionLayer] = dataclasses.field(default_factory=list)
    x: list[np.ndarray] = dataclasses.field(default_factory=list)


def train(run: Run, finished: Collection[int] = (), progress: Progress = no_progress) -> Iterator[Trained]:
    """The indexers of a run, group after group, but for those of the F layers in `finished`, which are only passed through.

    Under a mesh in force groups train side by side on its devices and come in the order in which they end; on CPUs one
    trains after the other. Of several processes, which all call this with the same arguments, each has those groups that it
    trained; it ends once all have.
    progress: called by one thread at a time with the floating-point operations done since its last call, of `work` altogether,
    and what is being done. ValueError where a divergence or a trained weight is not finite, or the mesh has another axis than
    data.
    """
    share = Share.in_force()
    if not share.devices:
        yield from (train_on(None) for train_on in _jobs(run, share, finished, progress))
        return
    lock, ended = threading.Lock(), threading.Event()

    def progress_in_turn(work: float, what: str) -> None:
        with lock:
            if ended.is_set():
                raise InterruptedError("the run has ended")  # in a thread whose result nobody waits for
            progress(work, what)

    free = list(share.devices)

    def train_on_a_free_device(job: Job) -> Trained:
        device = free.pop()
        try:
            return job(device)
        finally:
            free.append(device)

    running: set[futures.Future[Trained]] = set()
    with futures.ThreadPoolExecutor(len(share.devices)) as pool:
        try:
            for job in _jobs(run, share, finished, progress_in_turn):
                # The layers of the next group have run while all devices train: other processes' groups needed them.
                patience = None if len(running) == len(share.devices) else 0
                ended_now, running = futures.wait(running, patience, futures.FIRST_COMPLETED)
                yield from (future.result() for future in ended_now)
                running.add(pool.submit(train_on_a_free_device, job))
                if not _may_train_beside_layers(share.devices):
                    futures.wait(running)
            yield from (future.result() for future in futures.as_completed(running))
        finally:
            ended.set()  # so that an error or an interrupt waits for a step of the others, not for all of them
    share.wait_for_others()


def _may_train_beside_layers(devices: Sequence[jax.Device]) -> bool:
    """Whether groups may train on the devices while layers run on all of them.

    Not on CPUs: XLA runs what threads dispatch and the parts of a program of several devices in one pool of few threads. Parts
    that wait for each other take them, and all hang.
    """
    return devices[0].platform != "cpu"


def _jobs(run: Run, share: Share, finished: Collection[int], progress: Progress) -> Iterator[Job]:
    """What trains each unfinished group of this process, made once the layers of the group have run."""
    if not (groups := unfinished(run, finished)):
        return
    own, last = share.of(groups), last_layer(groups)
    taught, taught_here = ({layer for group in some for layer in group} for some in (groups, own))
    states, reading = embedded(run, whole=0 in taught_here), in_order(run.layers, shardings_in_force(run.layers))
    gathered: dict[int, Gathered] = {}
    for layer in range(last + 1):
        _, params = next(reading)
        taught_by_it = [group for group in own if layer in group]
        if taught_by_it:
            stacked = AttentionLayer(held(params.input_norm), held(params.attention), None)
        for first, *_ in taught_by_it:
            if layer == first:
                gathered[first] = Gathered(held(params.indexer))
            gathered[first].layers.append(stacked)
            gathered[first].x.append(states.x)
        if layer != last:
            share.wait_for_others()
            exchanged, whole = share.processes > 1 and layer + 1 in taught, layer + 1 in taught_here
            states = advanced(run, params, layer, states, in_place=not taught_by_it, exchanged=exchanged, whole=whole)
            progress(pass_work(run), f"layer {layer}")
        del params
        for group in taught_by_it:
            if layer == group[-1]:
                yield functools.partial(_train_group, run, group, gathered.pop(group[0]), progress=progress)


def _train_group(
    run: Run, group: tuple[int, ...], gathered: Gathered, device: jax.Device | None, progress: Progress
) -> Trained:
    """The indexer of a group, trained on a device. `gathered` loses its hidden states as soon as nothing needs them."""
    began = time.perf_counter()
    with jax.default_device(device):
        p, divergence = _steps(run, group, gathered, device, progress)
    return _checked(Trained(group[0], p, divergence, time.perf_counter() - began))


def _steps(
    run: Run, group: tuple[int, ...], gathered: Gathered, device: jax.Device | None, progress: Progress
) -> tuple[Indexer, np.ndarray]:
    """The indexer and its divergence at every step."""
    layers = [at_layer(stacked, 0) for stacked in jax.device_put(gathered.layers, device)]
    gathered.layers.clear()
    share = [jnp.float32(share) for share in run.shares(group[0]).values()]
    kept = rows_on_device(device, run, len(group))
    make = kept_targets if run.keeps_targets else recomputed_targets
    first, inputs = layers[0], states_of(gathered.x[0], kept)
    others = (states_of(x, 0 if run.keeps_targets else kept) for x in gathered.x[1:])
    states = [inputs, *others]
    gathered.x.clear()
    targets_of = make(run, layers, states, share, kept, lambda work: progress(work, f"layer {group[0]}: targets"))
    del layers
    states.clear()  # targets that are kept need no hidden states but the first layer's
    p = jax.tree.map(lambda a: jnp.array(a, jnp.float32), at_layer(jax.device_put(gathered.indexer, device), 0))
    state = step.optimiser(run.stage, run.config).init(p)
    steps, cost = jnp.int32(run.stage.steps), step_work(run, len(group))
    values: list[jax.Array] = []
    shown = ""
    for number, rows in enumerate(run.rows(group[0])):
        p, state, value = step.take_step(
            p, state, first, inputs.of(rows), targets_of(rows), run.config, run.stage.program, steps
        )
        values.append(value)
        if number >= 2:
            shown = f", divergence {float(values[number - 2]):.4f}"  # of an earlier step, so that devices are not waited for
        progress(cost, f"layer {group[0]}: step {number + 1}/{run.stage.steps}{shown}")
    return jax.device_get(p), np.array(values, np.float32)


def _checked(trained: Trained) -> Trained:
    finite = np.isfinite(trained.divergence)
    if not finite.all():
        raise ValueError(f"indexer of layer {trained.layer}: its divergence at step {np.argmin(finite)} is not finite")
    for name, array in tensors.leaves(trained.indexer):
        if not np.isfinite(array).all():
            raise ValueError(f"indexer of layer {trained.layer}: {name} is not finite after training")
    return trained
