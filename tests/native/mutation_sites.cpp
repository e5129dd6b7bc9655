#include "mutation_sites.h"

int fusedreg_mutation = 0;
