# The face of the room: what other rooms may import. Each name is loaded when it is first used.
from .export import export_gguf as export_gguf
from .export import gguf_file as gguf_file
from .gguf import write_gguf as write_gguf
from .gguf_adapter import write_gguf_adapter as write_gguf_adapter
from .quantised import score_quantised as score_quantised
from .settings import GgufSettings as GgufSettings
from .settings import QuantisedSettings as QuantisedSettings
from .settings import bits_of as bits_of
from .speed import measure_speed as measure_speed
from .speed import read_speed as read_speed
from .trim import trim_checkpoint as trim_checkpoint
from .trim import trim_gguf as trim_gguf
