"""What the applications in this folder share: services that run and can be asked what they have counted.

running.py: a service in its process. desk.py: hosts of a run, from the launcher's side and from their own. clocks.py: their CPU time.
"""
