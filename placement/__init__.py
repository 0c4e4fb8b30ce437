"""Where Ray puts the workers: placement groups, devices, ports, topology. Knows Ray and nothing of queues.

bundles    the reservation a group runs in: a placement group, and one bundle of it per worker
capacity   what the cluster has, what is free, whether a request can ever fit
occupancy  what is free inside the bundles of an existing placement group
devices    the place and GPUs a worker really got, and the check against what was promised
ports      TCP ports that are held from the moment they are chosen
topology   pure functions from places to ranks
"""
