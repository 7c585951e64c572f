"""Pictures are sent through seven services, of which only the last looks at them.

                                      ┌▶ processor-1 ┐ ┌▶ transcoder
    client ──▶ firewall ──▶ balancer ─┤              ├─┤
                                      └▶ processor-2 ┘ └▶ compressor

The client sends bitmaps. The firewall lets those through whose sender is known. The balancer deals them out to two image
processors, which read what is wanted and pass them on to one of two workers. Replies come back the same way. By value, a
picture is copied at every step; by reference it is written once, and read once.

``scripts/run_fabric.sh`` or ``python -m examples.image_pipeline`` runs it: docs/image-pipeline.md. Map of the package:

    bmp.py, work.py, photographs.py     pictures, and what is done to them; know nothing of DM
    messages.py, users.py               what the services say to each other, and who may
    variants.py, store.py               how pictures travel: a class for each way
    services.py                         what each service does
    roles.py, hosts.py                  starting services, in any process; the processes, for the launcher
    client.py                           sending pictures, one by one or in a loop, and checking results
    session.py, measure.py              the main job: variants in turn, and what each has taken
    report.py, plots.py, report.html    what it shows in the end
"""
