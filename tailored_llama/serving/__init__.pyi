# The face of the room: what other rooms may import. Each name is loaded when it is first used.
from .export import export_gguf as export_gguf
from .gguf import write_gguf as write_gguf
from .gguf_adapter import write_gguf_adapter as write_gguf_adapter
from .quantised import score_quantised as score_quantised
from .settings import GgufSettings as GgufSettings
from .settings import QuantisedSettings as QuantisedSettings
from .trim import Trimmed as Trimmed
from .trim import trim_checkpoint as trim_checkpoint
from .trim import trim_gguf as trim_gguf
