# The face of the room: what other rooms may import. Each name is loaded when it is first used.
from . import modeling_tailored_llama as modeling_tailored_llama
from .adapters import (
    add_adapter as add_adapter,
    merge_adapter as merge_adapter,
    save_adapter as save_adapter,
)
from .attention import (
    Header as Header,
)
from .cards import (
    Base as Base,
    CARD as CARD,
    base_of as base_of,
    front_matter as front_matter,
    is_layered as is_layered,
    loading as loading,
    pruned_card as pruned_card,
    what_was_removed as what_was_removed,
    write_card as write_card,
)
from .checkpoints import (
    FUSED as FUSED,
    GGUF_KINDS as GGUF_KINDS,
    LAYERED_PREFIX as LAYERED_PREFIX,
    Layer as Layer,
    Size as Size,
    Structure as Structure,
    VOCABULARY as VOCABULARY,
    all_tensor_shapes as all_tensor_shapes,
    check_checkpoint as check_checkpoint,
    copy_tokenizer as copy_tokenizer,
    read_config as read_config,
    read_structure as read_structure,
    tensor_shapes as tensor_shapes,
    weight_bytes as weight_bytes,
    weight_files as weight_files,
)
from .convert import (
    prepare_dense as prepare_dense,
)
from .devices import (
    check_solver as check_solver,
    device_slot as device_slot,
    devices_of as devices_of,
    pick_device as pick_device,
    solver_bytes as solver_bytes,
)
from .id_table import (
    IdTable as IdTable,
    check_teacher as check_teacher,
    read_id_table as read_id_table,
)
from .layouts import (
    BY_LAYER as BY_LAYER,
    block_of as block_of,
    layered_config as layered_config,
    layout_config as layout_config,
    without_layers as without_layers,
)
from .load import (
    check_adapter as check_adapter,
    head_logits as head_logits,
    load_model as load_model,
    load_tokenizer as load_tokenizer,
    stored_dtype as stored_dtype,
)
from .modeling_tailored_llama import (
    LAYERED as LAYERED,
)
from .packing import (
    Document as Document,
    HEAD_POSITIONS as HEAD_POSITIONS,
    batches as batches,
    encode_header as encode_header,
    halved as halved,
    packed_attention as packed_attention,
    packed_inputs as packed_inputs,
    packed_logprobs as packed_logprobs,
    packed_states as packed_states,
    target_logprobs as target_logprobs,
    token_budget as token_budget,
    within_memory as within_memory,
)
from .passes import (
    PackedRow as PackedRow,
    run_packed as run_packed,
)
from .quantization import (
    check_installed as check_installed,
    check_quantizable as check_quantizable,
    load_base as load_base,
)
from .shards import (
    open_tensors as open_tensors,
    write_shards as write_shards,
)
from .soft_prompts import (
    context_length as context_length,
    has_soft_prompt as has_soft_prompt,
    learnt_header as learnt_header,
)
from .streaming import (
    Forward as Forward,
    Layers as Layers,
    Shelf as Shelf,
    caller as caller,
    enter as enter,
    layers_of as layers_of,
    open_model as open_model,
    streams as streams,
)
from .tokens import (
    encode as encode,
    encode_pair as encode_pair,
    first_token as first_token,
    pre_tokenizer_name as pre_tokenizer_name,
)
from .vocabulary import (
    Tokens as Tokens,
    read_tokens as read_tokens,
    renumber_generation as renumber_generation,
    renumbered as renumbered,
    trim_tokenizer as trim_tokenizer,
)
from .sources import (
    DenseSettings as DenseSettings,
    ModelSource as ModelSource,
    fetch_model as fetch_model,
    find_model as find_model,
    source_architecture as source_architecture,
)
