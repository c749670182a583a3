"""What a run will cost, counted from shapes: parameters, FLOPs, memory, tokens. No torch, nothing is built.

Letters in the formulas: H hidden, A = heads * head_dim, K = kv_heads * head_dim, F ffn, V vocabulary, L seq_length,
B micro_batch_size, TP/PP/DP the parallel sizes. Context parallelism gives a rank L / CP of a row's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_md.config import Config, ModelConfig, ResolvedConfig, ResolvedModel, to_yaml
from megatron_md.config.lora import LINEARS
from megatron_md.diffusion.pairs import law_of_rates
from megatron_md.run.check import Layout
from megatron_md.run.epochs import Passes
from megatron_md.train.progress import Progress, batch_size_at


def _scaled(value: float, unit: str, base: int) -> str:
    """A number with a prefix that keeps it readable: `1.87 GiB`, `49.9 GFLOP`."""
    prefixes = ("", "Ki", "Mi", "Gi", "Ti") if base == 1024 else ("", "k", "M", "G", "T", "P")
    power = 0
    while value >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    return f"{value:.2f} {prefixes[power]}{unit}"


def attention_widths(model: ModelConfig) -> tuple[int, int]:
    """Widths of all query heads and of all key (or value) heads together: (A, K)."""
    return model.heads * model.head_width, model.key_heads * model.head_width


def layer_matrices(model: ModelConfig) -> int:
    """Entries of one layer's weight matrices: 2HA + 2HK for attention, 3HF for SwiGLU."""
    query, key = attention_widths(model)
    return model.hidden * (2 * query + 2 * key + 3 * model.ffn)


def layer_vectors(model: ModelConfig) -> int:
    """Entries of one layer's norms and biases."""
    query, key = attention_widths(model)
    return (
        2 * model.hidden + (2 * model.head_width if model.qk_norm else 0) + (query + 2 * key if model.qkv_bias else 0)
    )


def parameter_count(model: ResolvedModel) -> int:
    """Parameters of the whole model, without the padding of the vocabulary."""
    embeddings = model.vocab * model.hidden * (1 if model.tied else 2)
    positions = model.max_length * model.hidden if model.position == "learned" else 0
    return embeddings + positions + model.layers * (layer_matrices(model) + layer_vectors(model)) + model.hidden


def trained_count(config: ResolvedConfig) -> int:
    """Parameters of the whole model that are trained: its own, or those of its adapters."""
    if config.lora is None:
        return parameter_count(config.model)
    return config.model.layers * config.lora.layer_parameters(config.model)


def padded_vocab(config: ResolvedConfig) -> int:
    """Rows of the embedding: the vocabulary rounded up to `parallel.vocab_multiple * parallel.tensor`."""
    unit = config.parallel.vocab_multiple * config.parallel.tensor
    return -(-config.model.vocab // unit) * unit


def predicted_fraction(config: Config) -> float:
    """Expected share of positions that are predicted, hence pass through the head: E[t], averaged over the run."""
    if config.objective.name == "autoregressive":
        return 1.0
    schedule = law_of_rates(config.objective)
    moments = [(step + 0.5) / 16 for step in range(16)]
    clean = 1.0 if config.objective.autoregressive_weight else 0.0  # a causal clean half is predicted as well
    return clean + sum(schedule.mean(progress) for progress in moments) / len(moments)


def highest_fraction(config: Config) -> float:
    """Share of positions that the head sees of a row at the highest mask rate that the run draws."""
    if config.objective.name == "autoregressive":
        return 1.0
    schedule = law_of_rates(config.objective)
    moments = [(step + 0.5) / 16 for step in range(16)]
    clean = 1.0 if config.objective.autoregressive_weight else 0.0
    return clean + max(float(schedule.inverse_cdf(np.ones(1), progress)[0]) for progress in moments)


def mean_of_blocks(config: Config) -> tuple[float, float]:
    """Of block diffusion, averaged over the run: pairs that attention sees per token of text, and copies of the text.

    Both halves of a row [x_t, x_0] see the blocks before each, half of the row on average, and the block: L + S pairs
    for a token and its copy. A row of a single block has no copy, unless that is predicted.
    """
    length, begin, pairs, copies = config.data.seq_length, 0.0, 0.0, 0.0
    for stage in config.objective.block_stages:
        share, begin = stage.until - begin, stage.until
        is_whole = stage.size >= length and not config.objective.autoregressive_weight
        pairs += share * (length if is_whole else length + stage.size)
        copies += share * (1 if is_whole else 2)
    return pairs, copies


def training_flops_per_token(
    config: Config, vocab: int, fraction: float | None = None, *, recomputation: bool = False
) -> float:
    """FLOPs of forward and backward for one token of a row, as executed; a multiply-add counts as two.

    Forward: `layers * (2 * matrices + 4 L A) + fraction * 2 H V`, with the full L x L attention of a bidirectional
    model (half of it under the causal mask of the autoregressive baseline), no embedding look-up, the head at
    predicted positions only. Backward is twice that, or once where the weights are frozen; their adapters do all
    three. Attention within documents does less than what is counted here, by how much the config cannot tell.

    Args:
        config: the run.
        vocab: rows of the output layer.
        fraction: share of positions that the head sees; E[t] of the mask schedule by default.
        recomputation: add what activation recomputation does again (the layers under `full`, their attention under
            `selective`); model FLOPs utilisation leaves it out.
    """
    model = config.model
    query, _ = attention_widths(model)
    attention = 4.0 * config.data.seq_length * query
    if config.objective.name == "autoregressive":
        attention /= 2.0
    copies = 1.0
    if config.objective.block_stages:
        pairs, copies = mean_of_blocks(config)
        attention = 4.0 * pairs * query
    head = (predicted_fraction(config) if fraction is None else fraction) * 2.0 * model.hidden * vocab
    frozen = copies * model.layers * 2.0 * layer_matrices(model) + head
    trained = copies * 2.0 * (config.lora.layer_parameters(model) * model.layers if config.lora else 0)
    attended = model.layers * attention
    again = {"none": 0.0, "selective": attended, "full": frozen - head + trained + attended}[config.train.recompute]
    passes = 3.0 if config.lora is None else 2.0
    return passes * frozen + 3.0 * (trained + attended) + (again if recomputation else 0.0)


def layers_per_stage(config: Config) -> list[int]:
    """Transformer layers of each pipeline rank."""
    layout = config.parallel
    first, last = layout.first_stage_layers, layout.last_stage_layers
    rest = config.model.layers - (first or 0) - (last or 0)
    middle = layout.pipeline - (first is not None) - (last is not None)
    counts = [rest // middle if middle else 0] * layout.pipeline
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    return counts


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at its fullest moment.

    Attributes:
        parameters: their number.
        weights, gradients, optimizer: held all the time.
        activations: kept for the backward pass.
        head: what the language-model head, or a layer's backward pass if that is more, takes for a while.
    """

    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


def _stage_parameters(config: ResolvedConfig, stage: int) -> int:
    """Parameters of one tensor-parallel rank of a pipeline stage."""
    model, layout = config.model, config.parallel
    first, last = stage == 0, stage == layout.pipeline - 1
    query, key = attention_widths(model)
    biases = query + 2 * key if model.qkv_bias else 0
    replicated = layer_vectors(model) - biases
    layer = (layer_matrices(model) + biases) // layout.tensor + replicated
    # A tied output layer on another stage than the embedding is a copy of it.
    tables = int(first) + int(last and not (model.tied and first))
    positions = model.max_length if model.position == "learned" and first else 0
    embeddings = tables * padded_vocab(config) * model.hidden // layout.tensor + positions * model.hidden
    return layers_per_stage(config)[stage] * layer + embeddings + (model.hidden if last else 0)


class _Activations:
    """Bytes that a rank of a stage holds besides weights, gradients and optimizer, by the local layers' own code.

    Counted as in section 4 of arXiv 2205.05198, for SwiGLU, RMSNorm, no dropout, and attention that keeps no L x L
    scores; `tests/simulate/test_step.py` holds it to what the real step allocates.
    """

    def __init__(self, config: ResolvedConfig, layout: Layout, stage: int) -> None:
        self.config, self.layout, self.stage = config, layout, stage
        parallel, train = config.parallel, config.train
        self.is_first, self.is_last = stage == 0, stage == parallel.pipeline - 1
        self.width = 2 if train.uses_bf16("cpu") else 4
        self.copies = 1 if mean_of_blocks(config)[1] <= 1.0 else 2
        self.rows = self.copies * train.micro_batch_size * config.data.seq_length / parallel.context
        self.hidden = self.width * self.rows * config.model.hidden
        self.own_hidden = self.hidden / (parallel.tensor if parallel.sequence_parallel else 1)

    def layer(self, recompute: str) -> float:
        """What one layer keeps of one micro-batch.

        The inputs of both norms and what follows them (4H); q, k, v in one tensor (A + 2K), q and k rotated (A + K),
        the attention's output (A) and its fp32 sums; gate, up and their product (3F). A frozen matrix keeps no input,
        its adapter does, and A x.
        """
        if recompute == "full":
            return self.own_hidden
        model, parallel = self.config.model, self.config.parallel
        query, key = attention_widths(model)
        # megatron-core copies queries of several groups; the copy is kept by whatever takes it as input.
        copied = query if model.heads > model.key_heads > parallel.tensor else 0
        inputs = query + key if model.qk_norm else copied
        after_norms, products, low = self._inputs()
        split = 2.0 * query + 2.0 * key + (2.0 + products) * model.ffn
        if recompute == "selective":
            split += inputs
        else:
            split += query + key if model.position == "rope" else inputs
            split += copied if model.qk_norm else 0
        sums = 4.0 * model.heads if recompute == "none" else 0.0
        sums += 4.0 * (model.heads + model.key_heads) if model.qk_norm else 0.0
        norms = 2 * 4.0 * self.rows * self.own_hidden / self.hidden
        kept = (2 + after_norms) * self.own_hidden + self.width * self.rows * low
        return kept + norms + self.rows * (self.width * split + sums) / parallel.tensor

    def _inputs(self) -> tuple[int, int, float]:
        """Of a layer's matrices: outputs of norms and products of gate and up that they keep, and widths of A x."""
        lora = self.config.lora
        if lora is None:
            return 2, 1, 0.0
        parts = {linear.name: len(linear.adapted(lora.targets)) for linear in LINEARS}
        split = self.config.parallel.tensor if self.config.parallel.sequence_parallel else 1
        low = lora.rank * (parts["qkv"] + parts["fc1"] + (parts["proj"] + parts["fc2"]) / split)
        return (parts["qkv"] > 0) + (parts["fc1"] > 0), parts["fc2"], low

    def kept(self) -> float:
        """What all layers keep at the fullest moment of the pipeline schedule, and the norm after them."""
        parallel, recompute = self.config.parallel, self.config.train.recompute
        chunks = parallel.virtual_pipeline
        warmup = parallel.pipeline - self.stage - 1
        in_flight = warmup + 1 if chunks == 1 else 2 * warmup + (chunks - 1) * parallel.pipeline + 1
        in_flight = min(in_flight, self.layout.micro_batches * chunks)
        layers = layers_per_stage(self.config)[self.stage] / chunks * in_flight
        # Under sequence parallelism rows are gathered in one buffer that stays, for the gradients of weights.
        gathered = self.hidden if parallel.sequence_parallel and self.config.lora is None else 0.0
        norm = 2 * self.own_hidden if self.is_last else 0.0
        # What has come from or goes to the neighbours.
        exchanged = (3 if chunks > 1 else 0 if self.is_first else 2) * self.own_hidden
        return layers * self.layer(recompute) + gathered + norm + exchanged

    def head(self) -> float:
        """What the head takes at once on CUDA: its weight's gradient, summed in fp32, and the logits of a chunk.

        A chunk has logits and their gradient, and the last chunk's are still there when the next one's are made. In
        bf16 there is a product that is added to the weight's gradient. A frozen weight has no gradient.
        """
        objective, model, tensor = self.config.objective, self.config.model, self.config.parallel.tensor
        vocab = padded_vocab(self.config) / tensor
        positions = highest_fraction(self.config) * self.rows / self.copies
        chunk = min(float(objective.head_chunk), positions)
        next_chunk = min(chunk, positions - chunk)
        weight = vocab * model.hidden if self.config.lora is None else 0.0
        product = 2 * weight if self.width == 2 else 0.0
        logits = self.width * vocab * max(2 * chunk + product / (self.width * vocab), 2 * chunk + next_chunk)
        return 4 * weight + logits + 2 * self.width * positions * model.hidden

    def backward(self) -> float:
        """What the backward pass of one layer takes at once, a recomputed layer included.

        The gradients of its output, and of gate and up in place of their product.
        """
        model, tensor, recompute = self.config.model, self.config.parallel.tensor, self.config.train.recompute
        again = self.layer("none") - self.layer(recompute) if recompute == "full" else 0.0
        return again + self.hidden + self.width * 2.0 * self.rows * model.ffn / tensor


def memory_per_rank(config: ResolvedConfig, layout: Layout) -> Memory:
    """What the fullest rank allocates, without the CUDA context, NCCL's buffers and fragmentation."""
    bf16 = config.train.uses_bf16("cpu")  # fp32 where the device is left open
    gradient = 4.0 if not bf16 or config.megatron.ddp.get("grad_reduce_in_fp32", True) else 2.0
    average = 4.0 if config.train.ema_decay is not None else 0.0
    shards = layout.data * layout.context if config.parallel.distributed_optimizer else 1

    def of_stage(stage: int) -> Memory:
        count = trained = _stage_parameters(config, stage)
        if config.lora is not None:
            per_layer = config.lora.layer_parameters(config.model, tensor=config.parallel.tensor)
            trained = layers_per_stage(config)[stage] * per_layer
            count += trained
        activations = _Activations(config, layout, stage)
        return Memory(
            parameters=count,
            weights=count * (2.0 if bf16 else 4.0),
            gradients=trained * gradient,
            optimizer=trained * ((12.0 if bf16 else 8.0) + average) / shards,
            activations=activations.kept(),
            head=max(activations.head() if activations.is_last else 0.0, activations.backward()),
        )

    return max((of_stage(stage) for stage in range(layout.pipeline)), key=lambda memory: memory.total)


def report(config: ResolvedConfig, layout: Layout, corpora: Sequence[Passes] = ()) -> str:
    """What `--dry-run` prints: the resolved config, the layout, all estimates, and the epochs of corpora."""
    model, train = config.model, config.train
    rows, vocab = padded_vocab(config), model.vocab
    count = parameter_count(model)
    padding = f" (embedding padded from {vocab:,} to {rows:,} rows)" if rows != vocab else ""
    fraction = predicted_fraction(config)
    executed = training_flops_per_token(config, rows, fraction)
    again = training_flops_per_token(config, rows, fraction, recomputation=True) - executed
    total_tokens = Progress.start(config).total_tokens
    tokens_per_step = train.global_batch_size * config.data.seq_length
    memory = memory_per_rank(config, layout)
    attention = {"autoregressive": "causal attention", "block_diffusion": "rows twice, attention in blocks"}.get(
        config.objective.name, "full L x L attention"
    )
    usual = _scaled(6.0 * count, "FLOP", 1000)
    parts = ("weights", "gradients", "optimizer", "activations", "head")
    shares = ", ".join(f"{part} {_scaled(getattr(memory, part), 'B', 1024)}" for part in parts)
    sizes = f"tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} x data {layout.data}"
    recomputed = f", and {_scaled(again, 'FLOP', 1000)} recomputed" if again else ""
    ramp = f" (from {batch_size_at(config, 0):,} rows at step 0)" if train.batch_ramp else ""
    facts = {
        "processes": f"{layout.world} = {sizes}",
        "layers per stage": ", ".join(map(str, layers_per_stage(config)))
        + (f" in {config.parallel.virtual_pipeline} chunks each" if config.parallel.virtual_pipeline > 1 else ""),
        "micro-batches": f"{layout.micro_batches} of {train.micro_batch_size} rows per rank and step",
        "vocabulary": f"{vocab:,}{padding}",
        "parameters": f"{count:,}" + (f" frozen, {trained_count(config):,} in adapters" if config.lora else ""),
        "predicted share": f"{fraction:.4f} of the positions pass through the head (expected mask rate)",
        "FLOPs per token": f"{_scaled(executed, 'FLOP', 1000)} "
        f"executed ({attention}, head at predicted positions){recomputed}",
        "usual figure": f"{usual} per token (6N: no attention, embedding and head at all positions)",
        "FLOPs in all": f"{(executed + again) * total_tokens:.3e}",
        "tokens per step": f"{tokens_per_step:,} = {train.global_batch_size:,} rows x {config.data.seq_length:,}{ramp}",
        "steps": f"{train.steps:,}",
        "tokens in all": f"{total_tokens:,} ({total_tokens / count:.2f} per parameter)",
        "memory per rank": f"{_scaled(memory.total, 'B', 1024)} on the fullest ({shares})",
    }
    for number, made in enumerate(corpora, start=1):
        facts["corpus" if len(corpora) == 1 else f"corpus {number}"] = f"{made} of {made.corpus}"
    width = max(map(len, facts))
    lines = [f"  {name:<{width}}  {value}" for name, value in facts.items()]
    return "\n".join(["# resolved config", to_yaml(config).rstrip(), "", "# layout and estimates", *lines])
