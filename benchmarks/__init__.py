"""How fast this package is, measured on models with random weights in the shapes of published checkpoints.

Not part of the installed package: `python -m benchmarks --help`, in a checkout, runs it.

    __main__        the command
    settings        what can be set, and what the parts are called
    run             one part after the other; what was measured is kept
    workbench       the models of a run, and prompts for them
    shapes, random_models   models and inputs
    uncomputed      operations of models that no memory holds
    timing, memory  what is read off them
    parts/          one file for each thing that is measured
    tables, method_tables, cells, verdicts, figure   what people are shown
    results/        figures of all benchmarks, as JSON
"""
