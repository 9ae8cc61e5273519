# What `import tailored_llama as tl` offers. Each name is loaded when it is first used.
from .api import Small as Small
from .api import Smallest as Smallest
from .api import compare as compare
from .api import prune as prune
from .api import smallest as smallest
from .api import tune as tune
from .pipeline import WaitingForLabels as WaitingForLabels
from .serving import Model as Model
from .serving import ModelAnswer as ModelAnswer
from .serving import load as load
