"""The experiments of the DmRPC paper, run side by side on this machine: `make figures`.

=============  =========================================================================================
``runner``     processes that stay alive, short blocks in random order, what each block took
``blocks``     the same, as seen from the process that sends the requests
``summary``    ratios within rounds and their spread, slopes, percentiles
``variants``   ways to pass an argument: by value, by Ref, object stores, Ray, Spark. One class each, one registry
``net``        the processes of variants over memory servers: a server, a fabric of hosts without the pool
``net_blocks`` blocks of calls of a memory server's client
``calls``      blocks of calls with an array; ``pictures`` and ``posts``: of requests to the two applications
``e0`` ...     one module for each experiment: ``run`` measures, ``draw`` plots, ``BARS`` and ``CLAIMS`` say
               what is expected
``plots``      what all plots look like
``report``     docs/results.md
=============  =========================================================================================

Rules. Whatever is compared was measured in the same run, in blocks that took turns, and every result was checked. *fresh* data
is written for each request, and all that its Ref, its pages and its faults cost lies inside the timed region; *pre-shared* data was
written once, as in the paper, and is a line of its own.
"""
