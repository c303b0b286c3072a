"""`attnkit train` and `attnkit predict`: one command from a model's name to weights, curves and pictures.

Nothing is imported here, so that `attnkit --help` stays fast: `run.train` is the training job as a function,
`predict.predict` classifies image files, `command` holds what the command line offers.

A run with one model writes straight into its folder; with a baseline, each model has a folder inside it:

    OUT/run.json               what was asked for; compared on `--resume`
    OUT/curves.png             loss and accuracy of every model over the epochs
    OUT/comparison.json        the final table as data
    OUT/samples/*.png          one test image a class, to try `attnkit predict` on (digits only)
    OUT/[MODEL/]metrics.jsonl  one line an epoch
    OUT/[MODEL/]best.safetensors, best.json    weights of the best epoch, and how to use them
    OUT/[MODEL/]last.safetensors, last.json    weights of the newest epoch
    OUT/[MODEL/]resume.safetensors             weights, optimizer and history: what `--resume` reads
    OUT/[MODEL/]attention.png  what each head group attends to on a test image
"""
