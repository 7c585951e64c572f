"""Random campaigns: eight hosts at work, processes killed and stopped at random moments, a model, an audit.

    python -m tests.soak --kills 10000 --seed 7

Host processes carry out random operations, on memory and by RPC, each with a model of its own: what it holds, and which bytes
that must show. They pass Refs on to each other. Meanwhile hosts are killed and replaced, stopped and continued; the
coordinator is killed, stopped, replaced. After each round of some dozens of kills everything rests, and is compared: every
mapping and Ref with the models, page tables and Ref entries with what the models hold, every frame with an exact account.

Files, from pure to not; each imports only from those above it::

    plan.py         seeds, and what follows from them
    board.py        words that all processes see
    children.py     forked processes
    mail.py         Refs on their way from host to host
    holdings.py     the model of one host: mappings, Refs, and their bytes
    acts.py         operations on memory
    calls.py        the service, and calls of it
    rush.py         what a host does when it is about to die
    program.py      a host process: acts until it is told to rest, or dies
    loop.py         what the driver waits for
    coordinators.py the coordinator, and what is done to it
    aim.py          who is inside an operation right now
    slots.py        the places of hosts, and what is done to their processes
    verdict.py      the comparison of a fabric at rest with the models
    campaign.py     rounds
    __main__.py     the command line

Each round has a seed of its own, printed when it begins: what every host does, act by act, and what is done to whom when,
follow from that. What does not follow is the scheduling of processes, so a failure may need some repetitions.
"""
