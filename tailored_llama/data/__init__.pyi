# The face of the room: what other rooms may import. Each name is loaded when it is first used.
from . import benchmarks as benchmarks
from . import worked_example as worked_example
from .benchmarks import (
    Example as Example,
    headline_metric as headline_metric,
)
from .builtin import (
    BUILTIN as BUILTIN,
)
from .calibration import (
    read_calibration as read_calibration,
    sequences_at_once as sequences_at_once,
)
from .checks import (
    check_benchmark as check_benchmark,
)
from .custom import (
    named_columns as named_columns,
)
from .encoding import (
    Encoded as Encoded,
    encode_answer as encode_answer,
    encode_prompt as encode_prompt,
    shared_header as shared_header,
)
from .likelihoods import (
    loglikelihoods as loglikelihoods,
)
from .prompts import (
    Prompt as Prompt,
    PromptSplit as PromptSplit,
    RenderedSplit as RenderedSplit,
    read_prompts as read_prompts,
    render as render,
)
from .selection import (
    select_train as select_train,
    without as without,
)
from .splits import (
    Split as Split,
)
from .templates import (
    candidates as candidates,
    layout_of as layout_of,
    load_template as load_template,
    study_templates as study_templates,
)
from .texts import (
    check_text as check_text,
    load_texts as load_texts,
)
from .benchmarks import (
    BenchmarkSource as BenchmarkSource,
    load_benchmark as load_benchmark,
)
from .calibration import (
    load_calibration as load_calibration,
)
from .prompts import (
    PromptSettings as PromptSettings,
    render_prompts as render_prompts,
)
from .texts import (
    TextSource as TextSource,
    find_text as find_text,
)
from .settings import (
    CalibrationSettings as CalibrationSettings,
)
