#!/bin/bash
# Train under Open MPI, one process for each GPU; mpirun is started anew until the run is done.
#
#   NP=16 HOSTS=node1:8,node2:8 tools/launch/mpirun.sh experiments/gpt3.py:xl --run-dir runs/xl
#
# Open MPI 4 tells JAX where the first process is. Later versions do not: there, run
#   mpirun ... bash -c 'gptjax train "$@" --coordinator node1:1234 \
#     --num-processes $OMPI_COMM_WORLD_SIZE --process-id $OMPI_COMM_WORLD_RANK' train ARGUMENTS...
options=(-n "${NP:-2}" --output-filename "${LOGS:-mpirun-logs}")
# When one process is killed, or mpirun itself hears SIGTERM, mpirun asks all to stop after so many
# seconds, and kills them after as many more: time to save and to log why. Its default is 1.
options+=(--mca odls_base_sigkill_timeout 10)
[ -n "${HOSTS:-}" ] && options+=(--host "$HOSTS")
[ "$(id -u)" = 0 ] && options+=(--allow-run-as-root)

trap 'stopped=1; kill -TERM $mpirun' TERM INT
for attempt in {1..100}; do
  mpirun "${options[@]}" ${MPIRUN_OPTIONS:-} gptjax train "$@" & mpirun=$!
  wait $mpirun
  code=$?
  [ -n "${stopped:-}" ] && { wait $mpirun; exit 75; }
  # 0 is done, and 2 to 7 are errors that would come again; the others (42 to 44, 137) are of
  # processes that were lost or stuck. The same command goes on from what is saved.
  ((code == 0 || 2 <= code && code <= 7)) && exit $code
  echo "exit code $code of attempt $attempt"
  sleep 5
done
exit $code
