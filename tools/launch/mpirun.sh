#!/bin/bash
# Train under Open MPI 4, one process for each GPU; mpirun is started anew until the run is done.
#
#   NP=16 HOSTS=node1:8,node2:8 tools/launch/mpirun.sh experiments/gpt3.py:xl --run-dir runs/xl
#
# Later versions of Open MPI do not tell JAX where the first process is. There, let mpirun start
#   bash -c 'gptjax train "$@" --coordinator node1:1234 --num-processes $OMPI_COMM_WORLD_SIZE \
#     --process-id $OMPI_COMM_WORLD_RANK' train ARGUMENTS...
logs=mpirun-logs/$(date +%F-%H%M%S) # below it, a folder for each attempt and process
options=(-n "${NP:?is the number of processes}" ${HOSTS:+--host "$HOSTS"} --bind-to none)
# When one process is killed, or mpirun itself hears SIGTERM, mpirun asks all to stop after so many
# seconds, and kills them after as many more: time to log why, and to save. Its default is 1.
options+=(--mca odls_base_sigkill_timeout 10)

stopped=
trap 'stopped=1; kill -TERM $mpirun' TERM INT
for attempt in {1..100}; do
  mpirun "${options[@]}" --output-filename "$logs/$attempt" gptjax train "$@" & mpirun=$!
  wait $mpirun
  code=$?
  [ "$stopped" ] && { wait $mpirun; exit 75; }
  # 0 is done, 1 to 7 are errors that would come again, and 75 is a run that was stopped. The others
  # (42 to 44, 137) are of processes that were lost or stuck: they go on from what is saved.
  ((code <= 7 || code == 75)) && exit $code
  echo "exit code $code of attempt $attempt"
  sleep 5 & wait $!
  [ "$stopped" ] && exit 75
done
exit $code
