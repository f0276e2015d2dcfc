"""Drop-in for transformers: ``model.generate(**inputs, custom_generate=hf.generate)``.

Greedy answers are those of plain `generate` outside near ties, sampled ones follow the same law
(with draws of our own: the same torch seed gives other tokens than transformers). Drafts come from
a memory of past answers of the same model object, from the prompt and from the answer itself,
unless a drafter is given; rows are verified where they pay. Threads may call it at the same time.

Privacy: the memory keeps the token ids of what was generated, in this process, until the model is
gone or `forget` is called; it shows in nothing but speed. `xspec_memory=False` keeps nothing.
"""

from .call import generate
from .kept import enable, forget, memory_of, set_memory

__all__ = ["enable", "forget", "generate", "memory_of", "set_memory"]
