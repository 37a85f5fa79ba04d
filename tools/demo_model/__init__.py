"""The bundled demo model: a corpus generator, a tokenizer, a training loop and an evaluation, all seeded.

Exact commands, from the repository's root (a virtual environment with the `dev` extra, and one GPU for the second):

    python -m microserve.tools.demo_model.tokenizer     # seconds; writes tokenizer files into runtime/bundled/demo
    python -m microserve.tools.demo_model.train         # minutes on one GPU; writes the checkpoint and training.json
    python -m microserve.tools.demo_model.evaluate      # minutes on a CPU; prints the held-out figures

`python -m microserve.tools.demo_model.corpus` prints samples of the training text.
"""
